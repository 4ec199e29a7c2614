// The demo page as a person uses it, in a real browser: its pictures are the native runtime's, and every way it can
// fail says what is wrong. Run by scripts/test-web.

import assert from 'node:assert/strict';
import { mkdir, readFile, readdir } from 'node:fs/promises';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { gzipSync } from 'node:zlib';
import {
  PROVIDERS, difference, inParallel, launch, nativeImages, serve, setting, shownImages,
} from './support.js';

const DESKTOP = { width: 1280, height: 900 };
const PHONE = { width: 360, height: 740 };

let server;
let browser;

before(async () => {
  server = await serve();
  browser = await launch();
});

after(async () => {
  await browser?.close();
  server?.stop();
});

/** Opens the page, runs the test, and checks that nothing outside the server was asked and nothing logged. */
async function onPage({ viewport = DESKTOP, colorScheme = 'light', search = '', hash = '', prepare, logs = false }, check) {
  const context = await browser.newContext({ viewport, colorScheme, acceptDownloads: true });
  const page = await context.newPage();
  const [foreign, logged] = [[], []];
  page.on('request', (r) => r.url().startsWith(server.url) || /^(data|blob):/.test(r.url()) || foreign.push(r.url()));
  page.on('console', (m) => ['error', 'warning'].includes(m.type()) && logged.push(m.text()));
  page.on('pageerror', (e) => logged.push(e.message));
  try {
    await prepare?.(page);
    await page.goto(server.url + search + hash);
    await check(page);
    assert.deepEqual(foreign, [], 'the page asked another server');
    if (!logs) assert.deepEqual(logged, [], 'the page logged problems');
  } finally {
    await context.close();
  }
}

function settled(page) {
  return page.waitForFunction(() => ['ready', 'failed'].includes(window.dmd?.state), null, { timeout: 60_000 });
}

async function generate(page, { seed, count, class: wanted = '' }) {
  await settled(page);
  await page.fill('#seed', String(seed));
  await page.fill('#count', String(count));
  await page.selectOption('#class', String(wanted));
  await page.click('#generate');
  await settled(page);
  assert.equal(await page.evaluate(() => window.dmd.state), 'ready');
  return shownImages(page);
}

async function screenshot(page, name) {
  const folder = process.env.DMD_SCREENSHOTS;
  if (!folder) return;
  await mkdir(folder, { recursive: true });
  await page.screenshot({ path: path.join(folder, `${name}.png`), fullPage: true });
}

function assertSame(shown, native) {
  assert.equal(shown.length, native.length);
  let total = 0;
  shown.forEach(({ rgba }, i) => {
    const { worst, differing } = difference(rgba, native[i]);
    assert.ok(worst <= 1, `image ${i} differs from the native runtime by ${worst} levels, expected at most 1`);
    total += differing;
  });
  return total;
}

async function assertFailed(page, pattern) {
  await settled(page);
  assert.match(await page.innerText('#error'), pattern);
  assert.equal(await page.isVisible('#loading'), false);
  assert.equal(await page.isDisabled('#generate'), true);
}

/** The controls that lie on top of another one. */
function overlaps(page) {
  return page.evaluate(() => {
    const controls = [...document.querySelectorAll('#fields :is(input, select, button)')].filter((c) => c.offsetParent);
    const boxes = controls.map((c) => [c.id, c.getBoundingClientRect()]);
    return boxes.flatMap(([a, one], i) => boxes.slice(i + 1)
      .filter(([, two]) => one.left < two.right && two.left < one.right && one.top < two.bottom && two.top < one.bottom)
      .map(([b]) => `${a} and ${b}`));
  });
}

function overflow(page) {
  return page.evaluate(() => document.scrollingElement.scrollWidth - window.innerWidth);
}

test('the images of 64 seeds are those of both native engines', async (t) => {
  await onPage({}, async (page) => {
    await settled(page);
    const classes = await page.evaluate(() => window.dmd.info.classes.count);
    const requests = Array.from({ length: 64 }, (_, seed) => ({ seed, count: 1, class: seed % classes }));
    const shown = [];
    for (const request of requests) shown.push(...await generate(page, request));
    assert.ok(new Set(shown.map((s) => s.rgba.join())).size === 64, 'two images are the same');
    for (const provider of PROVIDERS) {
      const native = await inParallel(requests, (request) => nativeImages({ ...request, provider }));
      const differing = assertSame(shown, native.flat(1));
      t.diagnostic(`${provider}: ${differing} levels of ${(64 * shown[0].rgba.length * 3) / 4} differ, by 1`);
    }
  });
});

test('64 images of a seed are those of both native engines', async (t) => {
  await onPage({}, async (page) => {
    const shown = await generate(page, { seed: 42, count: 64 });
    for (const provider of PROVIDERS) assertSame(shown, await nativeImages({ seed: 42, count: 64, provider }));
    assert.ok(new Set(shown.map((s) => s.rgba.join())).size === 64, 'two images are the same');
    const { images, names } = await page.evaluate(() => ({
      images: window.dmd.lastImages.map((i) => ({ ...i, pixels: [...i.pixels] })),
      names: window.dmd.info.classes.names,
    }));
    images.forEach((image, k) => {
      assert.equal(image.class, k % names.length);
      assert.equal(shown[k].caption, names[k % names.length]);
      assert.deepEqual(image.pixels, shown[k].rgba, '`dmd.lastImages` is not what is shown');
    });
    const times = images.map((i) => i.milliseconds).sort((a, b) => a - b);
    t.diagnostic(`${times[32].toFixed(1)} ms per image (median of 64; ${times[0].toFixed(1)} to ${times[63].toFixed(1)})`);
    t.diagnostic(await page.innerText('#model'));
    assert.match(await page.innerText('#status'), /per image · 64 in/);
    await screenshot(page, 'desktop-light');
  });
});

test('a class can be chosen, and the address remembers it', async () => {
  await onPage({ colorScheme: 'dark' }, async (page) => {
    const shown = await generate(page, { seed: 7, count: 12, class: 3 });
    assert.deepEqual(await overlaps(page), []);
    const name = await page.evaluate(() => window.dmd.info.classes.names[3]);
    assert.deepEqual(shown.map((s) => s.caption), Array(12).fill(name));
    assertSame(shown, await nativeImages({ seed: 7, count: 12, class: 3 }));
    await screenshot(page, 'desktop-dark');

    const { hash } = new URL(page.url());
    assert.equal(hash, '#seed=7&count=12&class=3');
    await onPage({ hash }, async (again) => {
      await settled(again);
      assert.deepEqual(await shownImages(again), shown);
    });
  });
});

test('image k of a seed does not depend on what else is generated', async () => {
  await onPage({}, async (page) => {
    const ten = await generate(page, { seed: 4294967295, count: 10 });
    const three = await generate(page, { seed: 4294967295, count: 3 });
    assert.deepEqual(three, ten.slice(0, 3));
    const other = await generate(page, { seed: 0, count: 3 });
    assert.notDeepEqual(other, three);
  });
});

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

test('the page is isolated', async () => {
  await onPage({ hash: '#count=1' }, async (page) => {
    await settled(page);
    assert.equal(await page.evaluate(() => crossOriginIsolated), true);
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

test('what a visitor downloads stays small', async (t) => {
  const site = setting('DMD_WEB_SITE');
  const size = async (file) => gzipSync(await readFile(path.join(site, file)), { level: 9 }).length;
  const wasm = await Promise.all(['simd128', 'relaxed-simd'].map((build) => size(`pkg/${build}/dmd_runtime_wasm_bg.wasm`)));
  const files = (await readdir(site, { recursive: true, withFileTypes: true })).filter((f) => f.isFile());
  const all = await Promise.all(files.map((f) => size(path.relative(site, path.join(f.parentPath, f.name)))));
  const total = all.reduce((a, b) => a + b);
  t.diagnostic(`wasm ${wasm.join(' and ')} bytes, everything ${total}, with gzip`);
  assert.ok(Math.max(...wasm) <= 1.5e6);
  assert.ok(total <= 3e6);
});

test('the keyboard alone is enough, and a run can be stopped', async () => {
  await onPage({}, async (page) => {
    await settled(page);
    await page.focus('#seed');
    await page.keyboard.press('Control+A');
    await page.keyboard.type('5');
    await page.keyboard.press('Tab');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'random');
    await page.keyboard.press('Tab');
    await page.keyboard.press('Control+A');
    await page.keyboard.type('1000');
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => window.dmd.lastImages.length > 2);
    assert.equal(await page.innerText('#generate'), 'Stop');
    await page.focus('#generate');
    await page.keyboard.press('Space');
    await settled(page);
    const made = await page.evaluate(() => window.dmd.lastImages.length);
    assert.ok(made > 2 && made < 1000, `${made} images`);
    assert.equal((await shownImages(page)).length, made);
    assert.match(await page.innerText('#status'), /^Stopped after \d+ of 1000 images$/);
  });
});

test('the random button takes another seed', async () => {
  await onPage({ hash: '#seed=1&count=2' }, async (page) => {
    await settled(page);
    const first = await shownImages(page);
    await page.click('#random');
    await settled(page);
    assert.notEqual(await page.inputValue('#seed'), '1');
    assert.notDeepEqual(await shownImages(page), first);
  });
});

test('a seed that is no u32 is not taken', async () => {
  await onPage({ hash: '#seed=1&count=2' }, async (page) => {
    await settled(page);
    for (const seed of ['-1', '4294967296', '1.5', '']) {
      await page.fill('#seed', seed);
      await page.click('#generate');
      assert.equal(await page.evaluate(() => window.dmd.lastRun.job), 1, `seed \`${seed}\` was taken`);
    }
  });
});

test('the pictures can be saved', async () => {
  await onPage({ hash: '#seed=3&count=4' }, async (page) => {
    await settled(page);
    const [download] = await Promise.all([page.waitForEvent('download'), page.click('#save')]);
    assert.equal(download.suggestedFilename(), 'one-step-seed-3.png');
    const png = await readFile(await download.path());
    const { height, width } = await page.evaluate(() => window.dmd.info.image);
    assert.equal(png.toString('latin1', 1, 4), 'PNG');
    assert.deepEqual([png.readUInt32BE(16), png.readUInt32BE(20)], [(2 * width + 6) * 4, (2 * height + 6) * 4]);
  });
});

test('loading shows its progress', async () => {
  const watch = () => {
    window.seen = [];
    new MutationObserver(() => {
      const text = document.getElementById('progress-text')?.textContent;
      if (text && text !== window.seen.at(-1)) window.seen.push(text);
    }).observe(document, { subtree: true, childList: true, characterData: true });
  };
  await onPage({ prepare: (page) => page.addInitScript(watch) }, async (page) => {
    await settled(page);
    const seen = await page.evaluate(() => window.seen);
    assert.ok(seen.some((text) => /^Loading model\.onnx: \d+\.\d\sMB of \d+\.\d\sMB$/.test(text)), seen.join('\n'));
    assert.equal(seen.at(-1), 'Preparing model.onnx…');
  });
});

test('a phone shows everything, and nothing scrolls sideways', async () => {
  await onPage({ viewport: PHONE }, async (page) => {
    await generate(page, { seed: 4294967295, count: 40 });
    assert.ok(await overflow(page) <= 0, `${await overflow(page)} pixels too wide`);
    assert.deepEqual(await overlaps(page), []);
    await screenshot(page, 'phone-light');
  });
  await onPage({ viewport: PHONE, colorScheme: 'dark' }, async (page) => {
    await generate(page, { seed: 42, count: 20, class: 7 });
    await screenshot(page, 'phone-dark');
  });
});

test('a truncated model is refused, and another one can be opened', async () => {
  const whole = await readFile(path.join(setting('DMD_WEB_SITE'), 'model.onnx'));
  const body = whole.subarray(0, whole.length / 2);
  const prepare = (page) => page.route('**/model.onnx', (route) => route.fulfill({ body }));
  await onPage({ viewport: PHONE, prepare }, async (page) => {
    await assertFailed(page, /^Got \d+ bytes that are not a complete ONNX file/);
    assert.ok(await overflow(page) <= 0, `${await overflow(page)} pixels too wide`);
    await screenshot(page, 'phone-error');
    await page.setInputFiles('#file', { name: 'mine.onnx', mimeType: '', buffer: whole });
    await page.waitForFunction(() => window.dmd.state === 'ready', null, { timeout: 60_000 });
    assert.equal(await page.isVisible('#error'), false);
    assert.ok((await shownImages(page)).length > 0);
  });
});

test('a file that is no model is refused', async () => {
  const prepare = (page) => page.route('**/model.onnx', (route) => route.fulfill({ body: '<!doctype html><p>hello' }));
  await onPage({ prepare }, (page) => assertFailed(page, /not a complete ONNX file/));
});

test('a missing model is named', async () => {
  const prepare = (page) => page.route('**/model.onnx', (route) => route.fulfill({ status: 404, body: '' }));
  await onPage({ prepare, logs: true }, (page) => assertFailed(page, /model\.onnx`: got status 404, expected 200/));
});

test('an address of a model that is none is shown', async () => {
  await onPage({ search: '?model=http://[' }, (page) => assertFailed(page, /`http:\/\/\[` is no address of a model/));
  await onPage({ search: '?model=%25.onnx', logs: true }, (page) => assertFailed(page, /got status 404, expected 200/));
});

test('a missing runtime is named', async () => {
  for (const file of ['**/dmd_runtime_wasm.js', '**/dmd_runtime_wasm_bg.wasm', '**/worker.js']) {
    const prepare = (page) => page.route(file, (route) => route.fulfill({ status: 404, body: '' }));
    const expected = file.includes('worker') ? /worker\.js/ : /Cannot load the WebAssembly runtime/;
    await onPage({ prepare, logs: true }, (page) => assertFailed(page, expected));
  }
});

test('a browser without SIMD is told so', async () => {
  const prepare = (page) => page.addInitScript(() => { WebAssembly.validate = () => false; });
  await onPage({ prepare }, async (page) => {
    await assertFailed(page, /no WebAssembly SIMD/);
    await screenshot(page, 'desktop-error');
  });
});
