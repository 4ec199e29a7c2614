// A generator in a worker: the page never blocks. One worker per generator, so that a crash or `free` leaves nothing behind.

/** @see index.d.ts */
export class WorkerGenerator {
  #worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  #jobs = new Map();
  #last = 0;
  #failure = null;

  constructor() {
    this.#worker.addEventListener('message', ({ data }) => this.#receive(data));
    this.#worker.addEventListener('error', (event) => {
      event.preventDefault();
      this.#fail(new Error(event.message ?? 'cannot start `worker.js`, which belongs beside `client.js`'));
    });
  }

  /** Starts a worker and loads a model into it. */
  static async load(source, { onProgress, cache = false, signal } = {}) {
    const generator = new WorkerGenerator();
    try {
      const from = source instanceof URL ? source.href : source;
      const url = typeof from === 'string' ? new URL(from, location.href).href : null;
      const loaded = await generator.#ask({ type: 'load', source: url ?? from, cache }, { onProgress, signal });
      Object.assign(generator, loaded);
      return generator;
    } catch (error) {
      generator.free();
      throw error;
    }
  }

  /** Generates images; `onImage` hears each when it is made. */
  generate(options = {}, { onImage, signal } = {}) {
    return this.#ask({ type: 'generate', options }, { onImage, signal });
  }

  /** The noise that images are generated from, as pictures. */
  noise(options = {}, { onImage, signal } = {}) {
    return this.#ask({ type: 'noise', options }, { onImage, signal });
  }

  /** Ends the worker; whatever is under way is rejected. */
  free() {
    this.#worker.terminate();
    this.#fail(new DOMException('the generator was freed', 'AbortError'));
  }

  #ask(message, { onProgress, onImage, signal }) {
    if (this.#failure) return Promise.reject(this.#failure);
    if (signal?.aborted) return Promise.reject(signal.reason);
    const id = ++this.#last;
    return new Promise((resolve, reject) => {
      const cancel = () => {
        this.#worker.postMessage({ id, type: 'cancel' });
        this.#jobs.delete(id);
        reject(signal.reason);
      };
      const done = () => {
        signal?.removeEventListener('abort', cancel);
        this.#jobs.delete(id);
      };
      signal?.addEventListener('abort', cancel, { once: true });
      this.#jobs.set(id, {
        images: [],
        onProgress,
        onImage,
        resolve: (value) => { done(); resolve(value); },
        reject: (error) => { done(); reject(error); },
      });
      this.#worker.postMessage({ id, ...message });
    });
  }

  #receive({ id, type, ...data }) {
    const job = this.#jobs.get(id);
    if (!job) return;
    if (type === 'progress') job.onProgress?.(data.received, data.total);
    else if (type === 'loaded') job.resolve(data.loaded);
    else if (type === 'error') job.reject(new Error(data.message));
    else if (type === 'done') job.resolve(job.images);
    else if (type === 'image') {
      const image = new ImageData(data.pixels, data.width, data.height);
      job.images.push(image);
      job.onImage?.(image, { image: data.image, milliseconds: data.milliseconds });
    }
  }

  #fail(error) {
    this.#failure ??= error;
    for (const job of [...this.#jobs.values()]) job.reject(error);
  }
}
