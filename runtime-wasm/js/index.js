// The package: a generator in this thread (`load`), or in a worker of its own (`WorkerGenerator`).

import { instructions } from './probe.js';

export { WorkerGenerator } from './client.js';
export { instructions };

let runtime;

/** Loads the build for this browser; `Generator` is its class. */
export function init() {
  runtime ??= start().catch((error) => {
    runtime = undefined; // the next call tries again
    throw error;
  });
  return runtime;
}

async function start() {
  const wanted = instructions();
  if (!wanted) {
    throw new Error('this browser has no WebAssembly SIMD\n\nhint: Chrome 91, Firefox 89 and Safari 16.4 are new enough');
  }
  try {
    const build = wanted === 'relaxed-simd'
      ? await import('./relaxed-simd/dmd_runtime_wasm.js')
      : await import('./simd128/dmd_runtime_wasm.js');
    await build.default();
    return build;
  } catch (error) {
    throw new Error(`cannot load the WebAssembly runtime \`${wanted}/dmd_runtime_wasm\`: ${error.message}\n\n`
      + 'hint: the package must be served whole', { cause: error });
  }
}

/** Downloads a model, or takes its bytes, and prepares it to run in this thread. */
export async function load(source, options) {
  const { Generator } = await init();
  return Generator.load(source, options);
}
