// The worker behind `WorkerGenerator`: one generator, one image at a time, so that a job can be cancelled between images.
// Messages in: {id, type: 'load', source, cache}, {id, type: 'generate' | 'noise', options}, {id, type: 'cancel'}.

import { load } from './index.js';

const CACHE = 'dmd-models-1';
const cancelled = new Set();
let generator = null;
let queue = Promise.resolve();

addEventListener('message', ({ data }) => {
  if (data.type === 'cancel') cancelled.add(data.id);
  else queue = queue.then(() => work(data));
});

async function work({ id, type, ...data }) {
  try {
    if (type === 'load') await loadModel(id, data);
    else await makeImages(id, type, data.options);
  } catch (error) {
    const crashed = error instanceof WebAssembly.RuntimeError;
    const message = crashed ? `the runtime crashed on this model: ${error.message}` : error.message;
    postMessage({ id, type: 'error', message });
  }
  cancelled.delete(id);
}

async function loadModel(id, { source, cache }) {
  let bytes = source.byteLength ?? 0;
  const onProgress = (received, total) => {
    bytes = received;
    postMessage({ id, type: 'progress', received, total });
  };
  const from = typeof source === 'string' && cache ? await cachedResponse(source) : source;
  const start = performance.now();
  generator = await load(from, { onProgress });
  const milliseconds = performance.now() - start;
  postMessage({ id, type: 'loaded', loaded: { info: generator.info(), bytes, milliseconds } });
}

/** The response kept from an earlier visit, if the server still has that version or cannot be asked; else a new one. */
async function cachedResponse(url) {
  if (!globalThis.caches) return url;
  const cache = await caches.open(CACHE);
  const kept = await cache.match(url);
  if (kept) {
    const now = await fetch(url, { method: 'HEAD' }).catch(() => null);
    const mark = (response) => ['ETag', 'Last-Modified', 'Content-Length'].map((name) => response.headers.get(name)).join();
    if (!now || (now.ok && mark(now) === mark(kept))) return kept;
  }
  const response = await fetch(url).catch((error) => {
    throw new Error(`cannot fetch the model \`${url}\`: ${error.message}`, { cause: error });
  });
  const marked = response.headers.has('ETag') || response.headers.has('Last-Modified');
  // A full disk must not keep the model from being shown.
  if (response.ok && marked) cache.put(url, response.clone()).catch(() => {});
  return response;
}

async function makeImages(id, type, options = {}) {
  const { first = 0, count = 1 } = options;
  for (let image = first; image < first + count; image++) {
    if (cancelled.has(id)) return;
    const start = performance.now();
    const [{ data, width, height }] = generator[type]({ ...options, first: image, count: 1 });
    const milliseconds = performance.now() - start;
    postMessage({ id, type: 'image', image, pixels: data, width, height, milliseconds }, [data.buffer]);
    // Lets a message in.
    if (image + 1 < first + count) await new Promise((resolve) => { setTimeout(resolve); });
  }
  postMessage({ id, type: 'done' });
}
