// One worker with one generator in it, asked for one thing at a time.

export class Thread {
  #worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  #job = null;

  /** `onFailure` hears if the worker cannot start or breaks down. */
  constructor(onFailure) {
    this.#worker.addEventListener('message', ({ data }) => this.#receive(data));
    this.#worker.addEventListener('error', (event) => {
      event.preventDefault();
      onFailure(new Error(event.message ?? 'cannot start `worker.js`, which belongs beside `thread.js`'));
    });
  }

  get idle() {
    return !this.#job;
  }

  /** Loads a model or makes an image: a promise of what the worker answers. */
  ask(message, onProgress) {
    return new Promise((resolve, reject) => {
      this.#job = { resolve, reject, onProgress };
      this.#worker.postMessage(message);
    });
  }

  end() {
    this.#worker.terminate();
  }

  #receive({ type, ...data }) {
    const { resolve, reject, onProgress } = this.#job;
    if (type === 'progress') {
      onProgress?.(data.received, data.total);
      return;
    }
    this.#job = null;
    if (type === 'error') reject(new Error(data.message));
    else resolve(data);
  }
}
