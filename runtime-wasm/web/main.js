// The page: controls, gallery, error states. The network runs in worker.js; this file never blocks.
// `window.dmd` shows what is on the page to tests and to the curious.

const $ = (id) => document.getElementById(id);
const DEFAULT_MODEL = 'model.onnx';

// The smallest module with a SIMD instruction: browsers without SIMD cannot compile the runtime.
const SIMD_PROBE = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
]);

const page = { state: 'loading', info: null, lastImages: [], lastRun: null };
window.dmd = page;

let worker = null;
let run = null;

start();

function start() {
  restoreFromAddress();
  $('controls').addEventListener('submit', (event) => {
    event.preventDefault();
    if (run) stop();
    else generate();
  });
  $('random').addEventListener('click', () => {
    $('seed').value = crypto.getRandomValues(new Uint32Array(1))[0];
    generate();
  });
  $('file').addEventListener('change', () => openFile($('file').files[0]));
  document.addEventListener('dragover', (event) => event.preventDefault());
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    openFile(event.dataTransfer.files[0]);
  });
  $('save').addEventListener('click', save);

  if (!WebAssembly.validate(SIMD_PROBE)) {
    $('open').hidden = true;
    fail('this browser has no WebAssembly SIMD\n\nhint: Chrome 91, Firefox 89 and Safari 16.4 are new enough');
    return;
  }
  const wanted = new URLSearchParams(location.search).get('model') ?? DEFAULT_MODEL;
  const url = attempt(() => new URL(wanted, location.href));
  if (url) {
    const name = url.pathname.split('/').pop();
    load({ type: 'load', url: url.href }, attempt(() => decodeURIComponent(name)) ?? name);
  } else {
    fail(`\`${wanted}\` is no address of a model\n\nhint: \`?model=\` takes the address of an ONNX file, or open one here`);
  }
}

/** The function's result; none if it throws. */
function attempt(work) {
  try {
    return work();
  } catch {
    return undefined;
  }
}

async function openFile(file) {
  if (!file) return;
  const bytes = await file.arrayBuffer();
  load({ type: 'load', bytes }, file.name, [bytes]);
}

// Every model gets a worker of its own: the last one's memory goes, and a crash leaves nothing behind.
function load(message, name, transfer = []) {
  worker?.terminate();
  run = null;
  Object.assign(page, { state: 'loading', info: null, lastImages: [], lastRun: null });
  $('gallery').replaceChildren();
  $('status').textContent = '';
  for (const id of ['error', 'warning', 'model', 'save', 'class-field']) $(id).hidden = true;
  $('loading').hidden = false;
  $('progress').removeAttribute('value');
  $('progress-text').textContent = `Loading ${name}…`;
  $('fields').disabled = true;

  worker = new Worker('worker.js', { type: 'module' });
  worker.addEventListener('message', ({ data }) => receive(data, name));
  worker.addEventListener('error', (event) => {
    fail(event.message ?? 'cannot start `worker.js`, which belongs beside this page');
  });
  worker.postMessage(message, transfer);
}

function receive(data, name) {
  if (data.type === 'progress') showProgress(data, name);
  else if (data.type === 'ready') ready(data, name);
  else if (data.type === 'image') showImage(data);
  else if (data.type === 'error') fail(data.message);
}

function showProgress({ received, total }, name) {
  if (total) {
    $('progress').max = total;
    $('progress').value = received;
  }
  const done = received === total;
  $('progress-text').textContent = done
    ? `Preparing ${name}…`
    : `Loading ${name}: ${megabytes(received)}${total ? ` of ${megabytes(total)}` : ''}`;
}

function ready({ info, bytes, milliseconds }, name) {
  page.info = info;
  $('loading').hidden = true;
  $('model').hidden = false;
  const { channels, height, width } = info.image;
  const facts = [
    ['Model', info.card?.name ?? name],
    ['Images', `${width} × ${height}, ${channels === 1 ? 'grey' : 'colour'}`],
    ['Size', megabytes(bytes)],
    ['Ready in', duration(milliseconds)],
  ];
  if (info.card) facts.splice(2, 0, ['Parameters', compact(info.card.parameters)]);
  $('model').replaceChildren(...facts.map(([term, value]) => {
    const pair = document.createElement('div');
    pair.append(element('dt', term), element('dd', value));
    return pair;
  }));
  if (info.warning) {
    $('warning').textContent = info.warning;
    $('warning').hidden = false;
  }
  fillClasses(info.classes);
  $('fields').disabled = false;
  page.state = 'ready';
  generate();
}

function fillClasses(classes) {
  $('class-field').hidden = !classes;
  const wanted = $('class').value || new URLSearchParams(location.hash.slice(1)).get('class') || '';
  const options = Array.from({ length: classes?.count ?? 0 }, (_, i) => new Option(className(i), i));
  $('class').replaceChildren(new Option('each in turn', ''), ...options);
  $('class').value = options.some((o) => o.value === wanted) ? wanted : '';
}

function className(index) {
  return page.info.classes?.names[index] ?? `class ${index}`;
}

function generate() {
  if (page.state === 'failed' || !page.info || !$('controls').reportValidity()) return;
  const selected = $('class').value;
  run = {
    job: (page.lastRun?.job ?? 0) + 1,
    seed: $('seed').valueAsNumber,
    count: $('count').valueAsNumber,
    class: selected === '' ? undefined : Number(selected),
    start: performance.now(),
    times: [],
  };
  page.lastRun = run;
  page.lastImages = [];
  page.state = 'generating';
  rememberInAddress();
  $('error').hidden = true;
  $('save').hidden = true;
  $('gallery').replaceChildren(...Array.from({ length: run.count }, emptyTile));
  $('generate').textContent = 'Stop';
  requestNext();
}

function requestNext() {
  worker.postMessage({
    type: 'generate', job: run.job, seed: run.seed, image: run.times.length, class: run.class,
  });
}

function showImage({ job, image, pixels, milliseconds }) {
  if (!run || job !== run.job) return;
  const { height, width } = page.info.image;
  const count = page.info.classes?.count;
  const index = count === undefined ? null : run.class ?? image % count;
  const tile = $('gallery').children[image];
  const canvas = tile.querySelector('canvas');
  canvas.getContext('2d').putImageData(new ImageData(pixels, width, height), 0, 0);
  const caption = index === null ? `${image}` : className(index);
  canvas.setAttribute('aria-label', `Image ${image}${index === null ? '' : `: ${caption}`}`);
  tile.querySelector('figcaption').textContent = caption;
  tile.title = `${caption}\nseed ${run.seed}, image ${image}, ${duration(milliseconds)}`;
  tile.classList.add('done');
  page.lastImages.push({ image, class: index, width, height, pixels, milliseconds });
  run.times.push(milliseconds);
  $('status').textContent = `${run.times.length} of ${run.count} images…`;
  if (run.times.length < run.count) requestNext();
  else finish();
}

function finish() {
  const { count, start, times } = run;
  const mean = times.reduce((sum, t) => sum + t, 0) / times.length;
  $('status').replaceChildren(
    element('strong', `${duration(mean)} per image`),
    ` · ${count} in ${duration(performance.now() - start)}`,
  );
  $('save').hidden = false;
  endRun('ready');
}

function stop() {
  for (const tile of document.querySelectorAll('#gallery figure:not(.done)')) tile.remove();
  $('status').textContent = `Stopped after ${run.times.length} of ${run.count} images`;
  $('save').hidden = run.times.length === 0;
  endRun('ready');
}

function endRun(state) {
  run = null;
  page.state = state;
  $('generate').textContent = 'Generate';
}

function fail(message) {
  const [problem, ...hints] = message.split('\n\n');
  const nodes = [element('strong', capital(problem))];
  for (const hint of hints) nodes.push(element('p', capital(hint.replace(/^hint: /, ''))));
  $('error').replaceChildren(...nodes);
  $('error').hidden = false;
  $('loading').hidden = true;
  $('status').textContent = '';
  $('fields').disabled = true;
  for (const tile of document.querySelectorAll('#gallery figure:not(.done)')) tile.remove();
  endRun('failed');
}

function emptyTile() {
  const tile = document.createElement('figure');
  const canvas = document.createElement('canvas');
  canvas.width = page.info.image.width;
  canvas.height = page.info.image.height;
  canvas.setAttribute('role', 'img');
  tile.append(canvas, element('figcaption', '\u00a0'));
  return tile;
}

function save() {
  const images = page.lastImages;
  const { width, height } = page.info.image;
  const [scale, gap] = [4, 2];
  const columns = Math.ceil(Math.sqrt(images.length));
  const sheet = document.createElement('canvas');
  sheet.width = (columns * (width + gap) + gap) * scale;
  sheet.height = (Math.ceil(images.length / columns) * (height + gap) + gap) * scale;
  const context = sheet.getContext('2d');
  context.fillStyle = 'white';
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.imageSmoothingEnabled = false;
  for (const [i, canvas] of [...document.querySelectorAll('#gallery canvas')].entries()) {
    const left = (gap + (i % columns) * (width + gap)) * scale;
    const top = (gap + Math.floor(i / columns) * (height + gap)) * scale;
    context.drawImage(canvas, left, top, width * scale, height * scale);
  }
  const link = document.createElement('a');
  link.download = `one-step-seed-${page.lastRun.seed}.png`;
  link.href = sheet.toDataURL('image/png');
  link.click();
}

function restoreFromAddress() {
  const saved = new URLSearchParams(location.hash.slice(1));
  for (const id of ['seed', 'count']) if (saved.has(id)) $(id).value = saved.get(id);
}

function rememberInAddress() {
  const saved = new URLSearchParams({ seed: run.seed, count: run.count });
  if (run.class !== undefined) saved.set('class', run.class);
  history.replaceState(null, '', `#${saved}`);
}

function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
}

function compact(number) {
  return new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 }).format(number);
}

function duration(milliseconds) {
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toFixed(1)}\u00a0s`;
  return `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)}\u00a0ms`;
}
