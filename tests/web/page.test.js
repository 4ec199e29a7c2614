// The demo page as a person uses it, in a real browser: its pictures are the native runtime's, and every way it can
// fail says what is wrong. Run by scripts/test-web.

import assert from 'node:assert/strict';
import { readFile, readdir } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import { gzipSync } from 'node:zlib';
import {
  PHONE, assertFailed, assertSame, generate, onPage, overflow, overlaps, screenshot, settled,
} from './page.js';
import { PROVIDERS, inParallel, nativeImages, setting, shownImages } from './support.js';

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

test('the page is isolated', async () => {
  await onPage({ hash: '#count=1' }, async (page) => {
    await settled(page);
    assert.equal(await page.evaluate(() => crossOriginIsolated), true);
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
