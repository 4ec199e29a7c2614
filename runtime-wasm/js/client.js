// A generator in workers of its own: the page never blocks, and a crash or `free` leaves nothing behind. Each worker has the whole
// model and makes whole images, so that several need neither shared memory nor an isolated page.

import { Thread } from './thread.js';

/** @see index.d.ts */
export class WorkerGenerator {
  #threads = [];
  #starting = [];
  #jobs = [];
  #failure = null;
  #model;

  /** Starts a worker and loads a model into it. */
  static async load(source, { onProgress, cache = false, signal } = {}) {
    const generator = new WorkerGenerator();
    const cancel = () => generator.#fail(signal.reason);
    try {
      signal?.throwIfAborted();
      signal?.addEventListener('abort', cancel, { once: true });
      const from = source instanceof URL ? source.href : source;
      generator.#model = { source: typeof from === 'string' ? new URL(from, location.href).href : from, cache };
      const { info, bytes, milliseconds } = await generator.#start(onProgress);
      return Object.assign(generator, { info, bytes, milliseconds });
    } catch (error) {
      generator.free();
      throw error;
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  }

  /** Starts workers until there are so many, each with the whole model. */
  async grow(workers) {
    whole('workers', workers, 1);
    const missing = Math.max(workers - this.#threads.length - this.#starting.length, 0);
    await Promise.all(Array.from({ length: missing }, () => this.#start()));
  }

  /** Generates images; `onImage` hears each when it is made. */
  async generate(options = {}, job = {}) {
    return this.#make('generate', options, job);
  }

  /** The noise that images are generated from, as pictures. */
  async noise(options = {}, job = {}) {
    return this.#make('noise', options, job);
  }

  /** Ends the workers; whatever is under way is rejected. */
  free() {
    this.#fail(new DOMException('the generator was freed', 'AbortError'));
  }

  #start(onProgress) {
    if (this.#failure) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      const thread = new Thread((error) => this.#fail(error));
      const entry = { thread, reject };
      this.#starting.push(entry);
      const loaded = thread.ask({ type: 'load', ...this.#model }, onProgress).finally(() => {
        this.#starting = this.#starting.filter((other) => other !== entry);
      });
      loaded.then((loaded) => {
        this.#threads.push(thread);
        if (this.info) this.info.threads = this.#threads.length;
        resolve(loaded);
        this.#work();
      }).catch((error) => {
        thread.end();
        reject(error);
      });
    });
  }

  #make(type, options, { onImage, signal }) {
    if (this.#failure) throw this.#failure;
    signal?.throwIfAborted();
    const [first, count] = [options.first ?? 0, options.count ?? 1];
    whole('first', first, 0);
    whole('count', count, 0);
    return new Promise((resolve, reject) => {
      const job = { type, options, onImage, first, next: first, end: first + count, missing: count, images: [] };
      const end = (settle) => (value) => {
        signal?.removeEventListener('abort', cancel);
        this.#jobs = this.#jobs.filter((other) => other !== job);
        settle(value);
      };
      Object.assign(job, { resolve: end(resolve), reject: end(reject) });
      const cancel = () => job.reject(signal.reason);
      signal?.addEventListener('abort', cancel, { once: true });
      this.#jobs.push(job);
      if (count === 0) job.resolve([]);
      this.#work();
    });
  }

  /** Gives every idle worker the next image of the oldest job that has one. */
  #work() {
    for (const thread of this.#threads) {
      const job = this.#jobs.find(({ next, end }) => next < end);
      if (!job) return;
      if (thread.idle) this.#image(thread, job);
    }
  }

  async #image(thread, job) {
    const image = job.next++;
    const { type, options, onImage } = job;
    try {
      const { pixels, width, height, milliseconds } = await thread.ask({ type, options: { ...options, first: image, count: 1 } });
      if (this.#jobs.includes(job)) {
        const picture = new ImageData(pixels, width, height);
        job.images[image - job.first] = picture;
        job.missing -= 1;
        onImage?.(picture, { image, milliseconds });
        if (job.missing === 0) job.resolve(job.images);
      }
    } catch (error) {
      job.reject(error);
    }
    this.#work();
  }

  #fail(error) {
    this.#failure ??= error;
    for (const { thread, reject } of this.#starting) {
      thread.end();
      reject(error);
    }
    for (const thread of this.#threads) thread.end();
    for (const job of [...this.#jobs]) job.reject(error);
  }
}

function whole(name, value, least) {
  if (!Number.isSafeInteger(value) || value < least) {
    throw new Error(`got \`${name}\` ${value}, expected a whole number of at least ${least}`);
  }
}
