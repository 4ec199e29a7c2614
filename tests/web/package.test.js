// The package's class in Node.js, where there is no page: loading, pictures, progress, errors; and the packages that wasm-pack makes. Run
// by scripts/test-web.

import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';
import { difference, nativeImages, serve, setting } from './support.js';

const site = setting('DMD_WEB_SITE');
let runtime;
let server;
let bytes;

before(async () => {
  server = await serve();
  runtime = await import(path.join(site, 'pkg/simd128/dmd_runtime_wasm.js'));
  await runtime.default({ module_or_path: await readFile(path.join(site, 'pkg/simd128/dmd_runtime_wasm_bg.wasm')) });
  bytes = await readFile(path.join(site, 'model.onnx'));
});

after(() => server?.stop());

test('pictures are objects of the shape of ImageData, and those of the native runtime', async () => {
  const generator = await runtime.Generator.load(bytes);
  const pictures = generator.generate({ seed: 77, count: 12 });
  const { image, classes, kind, steps, threads, engine, warning } = generator.info();
  assert.deepEqual([kind, steps, threads, engine, warning, classes.count], ['generator', 1, 1, 'dmd-engine', null, 10]);
  const native = await nativeImages({ seed: 77, count: 12 });
  assert.equal(pictures.length, 12);
  for (const [k, { data, width, height }] of pictures.entries()) {
    assert.deepEqual([width, height, data.length], [image.width, image.height, 4 * image.width * image.height]);
    assert.ok(data instanceof Uint8ClampedArray);
    assert.ok(difference(data, native[k]).worst <= 1, `image ${k}`);
  }
  assert.deepEqual(generator.generate({ seed: 77, first: 7 }), [pictures[7]]);
  const noise = generator.noise({ seed: 77 });
  assert.notDeepEqual(noise, [pictures[0]]);
  assert.deepEqual(generator.noise({ seed: 77, towards: { seed: 5, share: 0 } }), noise);
  assert.deepEqual(generator.noise({ seed: 77, towards: { seed: 5, share: 1 } }), generator.noise({ seed: 5 }));
  generator.free();
  assert.throws(() => generator.info());
});

test('a model is taken from an address, a response or bytes', async () => {
  const heard = [];
  const onProgress = (received, total) => heard.push([received, total]);
  const url = new URL('model.onnx', server.url);
  const sources = [url, url.href, await fetch(url), new Uint8Array(bytes), new Uint8Array(bytes).buffer];
  const pictures = [];
  for (const source of sources) {
    const generator = await runtime.Generator.load(source, { onProgress });
    pictures.push(generator.generate({ seed: 1 }));
    generator.free();
  }
  for (const picture of pictures) assert.deepEqual(picture, pictures[0]);
  assert.deepEqual(heard.at(-1), [bytes.length, bytes.length]);
  assert.ok(heard.every(([received, total]) => received <= total));
});

test('what goes wrong is an Error that says so', async () => {
  const refused = (promise, message) => assert.rejects(promise, { name: 'Error', message });
  const { load } = runtime.Generator;
  await refused(load(bytes.subarray(0, 1000)), /^got 1000 bytes that are not a complete ONNX file/);
  await refused(load(new URL('none.onnx', server.url)), /none\.onnx`: got status 404, expected 200\n\nhint: /);
  await refused(load('http://127.0.0.1:9/model.onnx'), /^cannot fetch the model `http:\/\/127\.0\.0\.1:9\/model\.onnx`: fetch failed$/);
  await refused(load(), /^got no model, expected an address, a response or bytes/);
  const breaking = (problem) => new Response(new ReadableStream({ pull: (to) => to.error(problem) }));
  await refused(load(breaking(new Error('cable cut'))), /^the download of `` broke off after 0 bytes: cable cut$/);
  await refused(load(breaking(5)), /^the download of `` broke off after 0 bytes: an unknown problem$/);
  const onProgress = () => { throw new Error('stop here'); };
  await refused(load(new URL('model.onnx', server.url), { onProgress }), /^stop here$/);
  const generator = await load(bytes);
  assert.throws(() => generator.generate({ seed: 0.5 }), { name: 'Error', message: /^got `seed` 0.5, expected a whole number/ });
  assert.throws(() => generator.generate({ seed: 4294967296 }), /got `seed` 4294967296/);
  assert.throws(() => generator.generate({ class: 10 }), /^Error: got class 10, expected 0 to 9$/);
  assert.throws(() => generator.generate({ towards: { seed: 1, share: 2 } }), /got share 2, expected 0 to 1/);
  generator.free();
});

test("wasm-pack's packages for web, bundlers and Node.js make the same pictures", async () => {
  const file = (target, name = 'dmd_runtime_wasm.js') => path.join(setting('DMD_WASM_PACK'), target, name);
  const [expected] = (await runtime.Generator.load(bytes)).generate({ seed: 3, class: 2 });
  const picture = ({ Generator }) => new Generator(bytes).generate({ seed: 3, class: 2 })[0];
  assert.deepEqual(picture(createRequire(import.meta.url)(file('nodejs'))), expected);
  const web = await import(file('web'));
  await web.default({ module_or_path: await readFile(file('web', 'dmd_runtime_wasm_bg.wasm')) });
  assert.deepEqual(picture(web), expected);
  // Bundlers, and Node.js with an option, import a .wasm file as a module.
  const script = `import { readFile } from 'node:fs/promises';
    const { Generator } = await import(${JSON.stringify(pathToFileURL(file('bundler')))});
    const generator = new Generator(await readFile(${JSON.stringify(path.join(site, 'model.onnx'))}));
    console.log(JSON.stringify([...generator.generate({ seed: 3, class: 2 })[0].data]));`;
  const options = ['--experimental-wasm-modules', '--input-type=module', '--eval', script];
  const { stdout } = await promisify(execFile)(process.execPath, options);
  assert.deepEqual(JSON.parse(stdout), [...expected.data]);
});
