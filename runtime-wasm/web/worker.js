// The worker behind the page: fetches a model, holds the one generator, makes one image per message.
// Messages in:  {type: 'load', url} | {type: 'load', name, bytes} | {type: 'generate', job, seed, image, class}
// Messages out: progress, ready, image, error. It knows nothing of the page.

let generator = null;

addEventListener('message', async ({ data }) => {
  try {
    if (data.type === 'load') {
      const runtime = await loadRuntime();
      const bytes = data.bytes ? new Uint8Array(data.bytes) : await download(data.url);
      const start = performance.now();
      generator = new runtime.Generator(bytes);
      postMessage({
        type: 'ready',
        info: generator.info(),
        bytes: bytes.length,
        milliseconds: performance.now() - start,
      });
    } else if (data.type === 'generate') {
      const start = performance.now();
      const [pixels] = generator.generate(data.seed, data.image, 1, data.class);
      const milliseconds = performance.now() - start;
      postMessage({ type: 'image', job: data.job, image: data.image, pixels, milliseconds }, [pixels.buffer]);
    }
  } catch (error) {
    const crashed = error instanceof WebAssembly.RuntimeError;
    const message = crashed ? `the runtime crashed on this model: ${error.message}` : error.message;
    postMessage({ type: 'error', message });
  }
});

async function loadRuntime() {
  try {
    const runtime = await import('./pkg/dmd_runtime_wasm.js');
    await runtime.default();
    return runtime;
  } catch (error) {
    throw new Error(`cannot load the WebAssembly runtime \`pkg/dmd_runtime_wasm\`: ${error.message}\n\n`
      + 'hint: `scripts/web-demo` builds it beside this page', { cause: error });
  }
}

async function download(url) {
  const response = await fetch(url).catch((error) => {
    throw new Error(`cannot fetch the model \`${url}\`: ${error.message}`, { cause: error });
  });
  if (!response.ok) {
    throw new Error(`cannot fetch the model \`${url}\`: got status ${response.status}, expected 200\n\n`
      + 'hint: `dmd-export` writes a model; put it beside this page, or open one from your disk');
  }
  const encoded = response.headers.has('Content-Encoding');
  const total = (!encoded && Number(response.headers.get('Content-Length'))) || null;
  const chunks = [];
  let received = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw new Error(`the download of \`${url}\` broke off after ${received} bytes: ${error.message}`, { cause: error });
    });
    if (done) break;
    chunks.push(value);
    received += value.length;
    postMessage({ type: 'progress', received, total });
  }
  const bytes = new Uint8Array(received);
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}
