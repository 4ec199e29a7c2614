// The demo page's slider between two seeds and its teacher, its models, and the package in a browser: worker, builds, memory. Run
// by scripts/test-web.

import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import { assertFailed, assertSame, onPage, screenshot, settled } from './page.js';
import { difference, nativeImages, setting, shownImages } from './support.js';

/** Moves the slider between the seeds and waits until its picture is shown: its RGBA values. */
async function between(page, { a, b, share, class: wanted }) {
  await page.fill('#seed-a', String(a));
  await page.fill('#seed-b', String(b));
  await page.selectOption('#morph-class', String(wanted));
  await page.locator('#share').fill(String(share));
  await page.waitForFunction(({ a, b, share, wanted }) => {
    const last = window.dmd.lastMorph;
    return last?.seed === a && last.towards.seed === b && last.towards.share === share && last.class === wanted;
  }, { a, b, share, wanted });
  return page.evaluate(() => [...window.dmd.lastMorph.pixels]);
}

test('the slider leads from one seed to another', async () => {
  await onPage({ hash: '#count=1' }, async (page) => {
    await settled(page);
    const [a, b] = [11, 12];
    const at = (share) => between(page, { a, b, share, class: 5 });
    const shown = [await at(0), await at(0.5), await at(1)];
    const [[first], [last]] = [await nativeImages({ seed: a, count: 1, class: 5 }), await nativeImages({ seed: b, count: 1, class: 5 })];
    assertSame([{ rgba: shown[0] }, { rgba: shown[2] }], [first, last]);
    for (const end of [first, last]) assert.ok(difference(shown[1], end).worst > 10, 'the middle is one of the ends');

    await page.focus('#share');
    await page.keyboard.press('Home');
    await page.waitForFunction(() => window.dmd.lastMorph.towards.share === 0);
    await page.click('#play');
    await page.waitForFunction(() => window.dmd.lastMorph.towards.share > 0.05);
    await page.click('#play');
    assert.equal(await page.innerText('#play'), 'Play');
    await page.click('#from-noise');
    await page.waitForTimeout(400);
    const fading = await page.evaluate(() => {
      const canvas = document.getElementById('morph-image');
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return data.some((v, i) => v !== window.dmd.lastMorph.pixels[i]);
    });
    assert.ok(fading, 'nothing is animated');
    const [download] = await Promise.all([page.waitForEvent('download'), page.click('#morph-save')]);
    assert.equal(download.suggestedFilename(), 'one-step-seeds-11-12.png');
  });
});

test('a teacher beside it takes its steps, and only one of the same images', async () => {
  const teacher = await readFile(setting('DMD_TEACHER'));
  await onPage({}, async (page) => {
    await settled(page);
    await page.setInputFiles('#teacher-file', { name: 'teacher.onnx', mimeType: '', buffer: teacher });
    await page.waitForFunction(() => window.dmd.lastTeacher?.steps === 50, null, { timeout: 60_000 });
    await page.fill('#teacher-steps', '7');
    await between(page, { a: 3, b: 4, share: 0, class: 2 });
    await page.waitForFunction(() => window.dmd.lastTeacher.steps === 7 && window.dmd.lastTeacher.seed === 3
      && window.dmd.lastTeacher.class === 2 && window.dmd.lastTeacher.towards.share === 0);
    const rgba = await page.evaluate(() => [...window.dmd.lastTeacher.pixels]);
    const native = await nativeImages({ seed: 3, count: 1, class: 2, steps: 7, model: setting('DMD_TEACHER') });
    assertSame([{ rgba }], native);
    await page.locator('#share').fill('0.4');
    await page.waitForFunction(() => window.dmd.lastTeacher.towards.share === 0.4);
    await screenshot(page, 'desktop-teacher');
  });
  await onPage({}, async (page) => {
    await settled(page);
    const other = await readFile(setting('DMD_OTHER_TEACHER'));
    await page.setInputFiles('#file', { name: 'other.onnx', mimeType: '', buffer: other });
    await page.waitForSelector('#morph-error:visible');
    assert.match(await page.innerText('#morph-error'), /^got a teacher of images of 16 × 16 with 3 channels, expected 28/);
    assert.equal(await page.evaluate(() => window.dmd.info.kind), 'generator');
  });
});

test('a second visit takes the model from the cache, and notices a new one', async () => {
  await onPage({ hash: '#count=1' }, async (page) => {
    const bytes = [];
    page.on('response', async (r) => r.url().endsWith('model.onnx') && r.request().method() === 'GET' && bytes.push(r.url()));
    await settled(page);
    bytes.length = 0;
    await page.waitForFunction(async () => (await (await caches.open('dmd-models-1')).keys()).length === 1);
    await page.reload();
    await settled(page);
    assert.equal(bytes.length, 0, 'the model was downloaded again');
    await page.evaluate(async () => {
      const cache = await caches.open('dmd-models-1');
      const [key] = await cache.keys();
      await cache.put(key, new Response('old', { headers: { 'Last-Modified': 'yesterday' } }));
    });
    await page.reload();
    await settled(page);
    assert.equal(await page.evaluate(() => window.dmd.state), 'ready');
    assert.equal(bytes.length, 1, 'an old model was taken');
  });
});

test('models are picked from a list, and dropped on the page', async () => {
  const whole = await readFile(path.join(setting('DMD_WEB_SITE'), 'model.onnx'));
  const prepare = async (page) => {
    await page.route('**/models.json', (route) => route.fulfill({ json: { models: ['model.onnx', 'second.onnx'], teacher: null } }));
    await page.route('**/second.onnx', (route) => route.fulfill({ body: whole }));
  };
  await onPage({ prepare, hash: '#count=1' }, async (page) => {
    await settled(page);
    const first = await shownImages(page);
    assert.deepEqual(await page.locator('#picker option').allInnerTexts(), ['model.onnx', 'second.onnx']);
    const loaded = page.waitForResponse('**/second.onnx');
    await page.selectOption('#picker', 'second.onnx');
    await loaded;
    await settled(page);
    assert.deepEqual(await shownImages(page), first);

    const dropped = await page.evaluateHandle((bytes) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], 'broken.onnx'));
      return data;
    }, [...whole.subarray(0, 100)]);
    await page.dispatchEvent('body', 'drop', { dataTransfer: dropped });
    await page.waitForFunction(() => window.dmd.state === 'failed');
    await assertFailed(page, /^Got 100 bytes that are not a complete ONNX file/);
  });
});

test('memory stays flat over 500 images', async (t) => {
  await onPage({ hash: '#count=1' }, async (page) => {
    await settled(page);
    const [early, late] = await page.evaluate(async () => {
      const { init } = await import('./pkg/index.js');
      const { default: start, Generator } = await init();
      const { memory } = await start();
      const generator = await Generator.load('model.onnx');
      const sizes = [];
      for (const end of [20, 500]) {
        for (let first = sizes.length ? 20 : 0; first < end; first++) generator.generate({ seed: 1, first });
        sizes.push(memory.buffer.byteLength);
      }
      generator.free();
      return sizes;
    });
    t.diagnostic(`${(late / 1e6).toFixed(1)} MB`);
    assert.equal(late, early);
  });
});

test('both builds make the same images', async (t) => {
  await onPage({ hash: '#count=1' }, async (page) => {
    await settled(page);
    const [one, two] = await page.evaluate(async () => {
      const images = [];
      for (const build of ['simd128', 'relaxed-simd']) {
        const runtime = await import(`./pkg/${build}/dmd_runtime_wasm.js`);
        await runtime.default();
        const generator = await runtime.Generator.load('model.onnx');
        if (generator.info().instructions !== build) throw new Error(generator.info().instructions);
        images.push(generator.generate({ seed: 8, count: 10 }).map(({ data }) => [...data]));
      }
      return images;
    });
    one.forEach((rgba, i) => {
      const gap = Math.max(...rgba.map((v, j) => Math.abs(v - two[i][j])));
      assert.ok(gap <= 1, `image ${i} differs by ${gap} levels`);
    });
    t.diagnostic(await page.innerText('#engine'));
  });
});

test('a job can be cancelled, and refusals are errors', async () => {
  await onPage({ hash: '#count=1' }, async (page) => {
    await settled(page);
    const got = await page.evaluate(async () => {
      const { WorkerGenerator } = await import('./pkg/index.js');
      const generator = await WorkerGenerator.load('model.onnx');
      const caught = (promise) => promise.then(() => 'nothing', (e) => `${e.name}: ${e.message}`);
      const abort = new AbortController();
      let made = 0;
      const onImage = () => { made += 1; if (made === 3) abort.abort(); };
      const messages = [await caught(generator.generate({ count: 1000 }, { onImage, signal: abort.signal }))];
      messages.push(String((await generator.generate({ seed: 1, count: 2 })).length), String(made));
      for (const options of [{ seed: -1 }, { class: 99 }, { seed: 'x' }, { towards: { seed: 2 } }, { steps: 2 }]) {
        messages.push(await caught(generator.generate(options)));
      }
      generator.free();
      messages.push(await caught(generator.generate()));
      return messages;
    });
    const expected = [
      /^AbortError/, /^2$/, /^3$/, /^Error: got `seed` -1, expected a whole number/, /^Error: got class 99, expected 0 to 9/,
      /^Error: got `seed` no number/, /^Error: got no `share`/, /^Error: got 2 steps, expected 1/, /^AbortError/,
    ];
    expected.forEach((pattern, i) => assert.match(got[i], pattern));
  });
});

test('several workers make the images of one, in order', async (t) => {
  await onPage({ hash: '#count=1' }, async (page) => {
    await settled(page);
    const got = await page.evaluate(async () => {
      const { WorkerGenerator } = await import('./pkg/index.js');
      const generator = await WorkerGenerator.load(await (await fetch('model.onnx')).arrayBuffer());
      const run = async () => {
        const [heard, start] = [new Set(), performance.now()];
        const onImage = (_, { image }) => heard.add(image);
        const images = await generator.generate({ seed: 8, first: 2, count: 40 }, { onImage });
        return { pixels: images.map(({ data }) => data.join()), heard: heard.size, milliseconds: performance.now() - start };
      };
      const [before, one] = [generator.info.threads, await run()];
      await generator.grow(3);
      await generator.grow(2);
      const [threads, three] = [generator.info.threads, await run()];
      const both = await Promise.all([generator.generate({ seed: 8, first: 2 }), generator.noise({ count: 3 }), generator.generate({ count: 0 })]);
      const refused = await generator.grow(0).then(() => 'nothing', (error) => error.message);
      const late = generator.generate({ count: 50 }).then(() => 'nothing', (error) => error.name);
      generator.free();
      const after = await generator.grow(4).then(() => 'nothing', (error) => error.name);
      return { before, one, threads, three, counts: both.map((images) => images.length), first: both[0][0].data.join(), refused, late: await late, after };
    });
    assert.deepEqual([got.before, got.threads, got.one.heard, got.three.heard, got.one.pixels.length], [1, 3, 40, 40, 40]);
    assert.deepEqual(got.three.pixels, got.one.pixels);
    assert.deepEqual([got.counts, got.first], [[1, 3, 0], got.one.pixels[0]]);
    assert.deepEqual([got.late, got.after], ['AbortError', 'AbortError']);
    assert.match(got.refused, /^got `workers` 0, expected a whole number of at least 1$/);
    t.diagnostic(`40 images: one worker ${got.one.milliseconds.toFixed()} ms, three ${got.three.milliseconds.toFixed()} ms`);
  });
});

test('the page uses the cores there are for a small model', async () => {
  const cores = (count) => ({ prepare: (page) => page.addInitScript((n) => Object.defineProperty(navigator, 'hardwareConcurrency', { value: n }), count) });
  for (const [count, text] of [[1, /^One thread, /], [3, /^3 threads, /], [64, /^4 threads, /]]) {
    await onPage({ hash: '#count=9', ...cores(count) }, async (page) => {
      await settled(page);
      await page.waitForFunction((n) => window.dmd.info.threads === n, Math.min(count, 4));
      await page.click('#generate');
      await settled(page);
      assert.match(await page.innerText('#engine'), text);
      assert.deepEqual(await page.evaluate(() => window.dmd.lastImages.map(({ image }) => image)), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    });
  }
});
