// The package with all of ONNX's operators, in Node.js: a file that only tract runs gives the native runtime's images, and dmd-export's own
// files run by the project's engine. Run by scripts/test-web where DMD_ALL_OPERATORS is set.

import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import { difference, nativeImages, setting } from './support.js';

async function generators(folder) {
  const runtime = await import(path.join(folder, 'simd128/dmd_runtime_wasm.js'));
  await runtime.default({ module_or_path: await readFile(path.join(folder, 'simd128/dmd_runtime_wasm_bg.wasm')) });
  return runtime.Generator;
}

test('a file of another exporter gives the images of the native runtime', async () => {
  const foreign = await readFile(setting('DMD_FOREIGN'));
  const Generator = await generators(setting('DMD_ALL_OPERATORS_PACKAGE'));
  const generator = new Generator(foreign);
  assert.equal(generator.info().engine, 'tract');
  const native = await nativeImages({ seed: 77, count: 10 });
  generator.generate({ seed: 77, count: 10 }).forEach(({ data }, k) => assert.ok(difference(data, native[k]).worst <= 1, `image ${k}`));
  const own = new Generator(await readFile(path.join(setting('DMD_WEB_SITE'), 'model.onnx')));
  assert.equal(own.info().engine, 'dmd-engine');
});

test('the package without them refuses it by the name of the operator', async () => {
  const foreign = await readFile(setting('DMD_FOREIGN'));
  const Generator = await generators(path.join(setting('DMD_WEB_SITE'), 'pkg'));
  assert.throws(() => new Generator(foreign), /\(Sum\): this operator is not one that `dmd-export` writes/);
});
