// A worker of `WorkerGenerator`: one generator, one image at a time.
// Messages in: {type: 'load', source, cache}, {type: 'generate' | 'noise', options}; each is answered before the next.

import { load } from './index.js';

const CACHE = 'dmd-models-1';
let generator = null;

addEventListener('message', async ({ data: { type, ...data } }) => {
  try {
    if (type === 'load') await loadModel(data);
    else makeImage(type, data.options);
  } catch (error) {
    const crashed = error instanceof WebAssembly.RuntimeError;
    const message = crashed ? `the runtime crashed on this model: ${error.message}` : error.message;
    postMessage({ type: 'error', message });
  }
});

async function loadModel({ source, cache }) {
  let bytes = source.byteLength ?? 0;
  const onProgress = (received, total) => {
    bytes = received;
    postMessage({ type: 'progress', received, total });
  };
  const from = typeof source === 'string' && cache ? await cachedResponse(source) : source;
  const start = performance.now();
  generator = await load(from, { onProgress });
  const milliseconds = performance.now() - start;
  postMessage({ type: 'loaded', info: generator.info(), bytes, milliseconds });
}

/** The response kept from an earlier visit, if the server still has that version or cannot be asked; else a new one. */
function cachedResponse(url) {
  if (!globalThis.caches) return url;
  return new Promise((resolve, reject) => {
    // Another worker that wants the same file waits until it is kept.
    const work = async () => {
      const { response, keeping } = await keptOrNew(url);
      resolve(response);
      await keeping;
    };
    (navigator.locks ? navigator.locks.request(`${CACHE} ${url}`, work) : work()).catch(reject);
  });
}

async function keptOrNew(url) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(url);
  if (kept) {
    const now = await fetch(url, { method: 'HEAD' }).catch(() => null);
    const mark = (response) => ['ETag', 'Last-Modified', 'Content-Length'].map((name) => response.headers.get(name)).join();
    if (!now || (now.ok && mark(now) === mark(kept))) return { response: kept };
  }
  const response = await fetch(url).catch((error) => {
    throw new Error(`cannot fetch the model \`${url}\`: ${error.message}`, { cause: error });
  });
  const marked = response.headers.has('ETag') || response.headers.has('Last-Modified');
  // A full disk must not keep the model from being shown.
  const keeping = response.ok && marked ? cache.put(url, response.clone()).catch(() => {}) : null;
  return { response, keeping };
}

function makeImage(type, options) {
  const start = performance.now();
  const [{ data, width, height }] = generator[type](options);
  const milliseconds = performance.now() - start;
  postMessage({ type: 'image', pixels: data, width, height, milliseconds }, [data.buffer]);
}
