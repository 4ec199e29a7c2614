// Exported files in onnxruntime-web, by its wasm provider in Node: the outputs are those of ONNX's reference evaluator, which
// scripts/check_onnx.py has left in the folder DMD_ONNX_CASES. Run by scripts/check-onnx.

import assert from 'node:assert/strict';
import { readFile, readdir } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import * as ort from 'onnxruntime-web';

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'error';

const folder = process.env.DMD_ONNX_CASES;
if (!folder) throw new Error('`DMD_ONNX_CASES` is not set; run scripts/check-onnx');
const files = (await readdir(folder)).filter((name) => name.endsWith('.json')).sort();
assert.ok(files.length > 0, `no cases in ${folder}`);

function tensor({ type, dims, data }) {
  const values = type === 'int64' ? data.map(BigInt) : data;
  return new ort.Tensor(type, ARRAYS[type].from(values), dims);
}

/** Largest difference of two lists of numbers, or its root mean square over theirs; infinite where one is not a number. */
function difference(got, expected, rms) {
  assert.equal(got.length, expected.length);
  if (!got.every(Number.isFinite)) return Infinity;
  if (rms) {
    const square = (values) => values.reduce((sum, value) => sum + value * value, 0);
    return Math.sqrt(square(expected.map((value, i) => value - got[i])) / square(expected));
  }
  return got.reduce((worst, value, i) => Math.max(worst, Math.abs(value - expected[i])), 0);
}

for (const file of files) {
  test(path.basename(file, '.json'), async (t) => {
    const { model, rms, tolerance, cases } = JSON.parse(await readFile(path.join(folder, file), 'utf8'));
    const session = await ort.InferenceSession.create(await readFile(model), { executionProviders: ['wasm'] });
    try {
      for (const { inputs, outputs } of cases) {
        const feed = Object.fromEntries(Object.entries(inputs).map(([name, value]) => [name, tensor(value)]));
        assert.deepEqual([...session.inputNames].sort(), Object.keys(feed).sort());
        const got = await session.run(feed);
        assert.deepEqual(Object.keys(got), Object.keys(outputs));
        for (const [name, { dims, data }] of Object.entries(outputs)) {
          assert.deepEqual([...got[name].dims], dims);
          const worst = difference(got[name].data, data, rms);
          assert.ok(worst <= tolerance, `batch ${dims[0]}: \`${name}\` differs by ${worst}, allowed ${tolerance}`);
          t.diagnostic(`batch ${dims[0]}: within ${worst.toExponential(1)}`);
        }
      }
    } finally {
      await session.release();
    }
  });
}
