import type { GenerateOptions, Generator, LoadOptions, ModelInfo } from './simd128/dmd_runtime_wasm.js';

export type { GenerateOptions, Generator, LoadOptions, ModelInfo, Picture } from './simd128/dmd_runtime_wasm.js';

export type ModelSource = string | URL | Response | ArrayBuffer | Uint8Array;

/** The instructions that this browser has; null where the runtime cannot run. */
export function instructions(): 'relaxed-simd' | 'simd128' | null;

/** Loads the build for this browser. */
export function init(): Promise<{ Generator: typeof Generator }>;

/** Downloads a model, or takes its bytes, and prepares it to run in this thread, which it blocks while it works. */
export function load(source: ModelSource, options?: LoadOptions): Promise<Generator>;

export interface WorkerLoadOptions extends LoadOptions {
  /** Keep the file in the browser's Cache API, and take it from there while the server has the same version. */
  cache?: boolean;
  signal?: AbortSignal;
}

export interface JobOptions {
  /** Hears each image when it is made: the number of the image, and how long it took. */
  onImage?: (image: ImageData, made: { image: number, milliseconds: number }) => void;
  /** Cancels: what is under way ends after the image in work, the promise is rejected at once. */
  signal?: AbortSignal;
}

/** A generator in a worker of its own, or in several that each make whole images. */
export class WorkerGenerator {
  static load(source: string | URL | ArrayBuffer | Uint8Array, options?: WorkerLoadOptions): Promise<WorkerGenerator>;
  /** `threads` is the number of workers. */
  readonly info: ModelInfo;
  /** Size of the file. */
  readonly bytes: number;
  /** How long loading took. */
  readonly milliseconds: number;
  /** Starts workers until there are so many, each with the whole model in its memory; an address is fetched again (or taken from the cache). */
  grow(workers: number): Promise<void>;
  generate(options?: GenerateOptions, job?: JobOptions): Promise<ImageData[]>;
  noise(options?: GenerateOptions, job?: JobOptions): Promise<ImageData[]>;
  free(): void;
}
