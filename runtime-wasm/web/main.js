// The page: models, error states, and what its two parts share. The network runs in a worker of the package `pkg/`.
// `window.dmd` shows what is on the page to tests and to the curious.

import { WorkerGenerator, instructions } from './pkg/index.js';
import { $, attempt, capital, compact, duration, element, megabytes } from './format.js';
import { gallery, restoreFromAddress } from './gallery.js';
import { morph } from './morph.js';

/** Bytes of a model that several workers may hold, and how many. */
const [SMALL, MOST_WORKERS] = [32e6, 4];

const page = { state: 'loading', info: null, generator: null, lastImages: [], lastRun: null };
window.dmd = page;

const images = gallery(page, fail);
const stage = morph(page);
let loads = 0;

start();

async function start() {
  restoreFromAddress();
  $('file').addEventListener('change', () => open($('file').files[0]));
  $('teacher-file').addEventListener('change', () => open($('teacher-file').files[0]));
  $('picker').addEventListener('change', () => load(address($('picker').value), $('picker').selectedOptions[0].text));
  document.addEventListener('dragover', (event) => event.preventDefault());
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    open(event.dataTransfer.files[0]);
  });

  if (!instructions()) {
    for (const id of ['open', 'teacher-open']) $(id).hidden = true;
    fail(new Error('this browser has no WebAssembly SIMD\n\nhint: Chrome 91, Firefox 89 and Safari 16.4 are new enough'));
    return;
  }
  const asked = new URLSearchParams(location.search).get('model');
  const { models, teacher } = asked === null ? await listed() : { models: [asked] };
  const url = address(models[0]);
  if (!url) {
    fail(new Error(`\`${asked}\` is no address of a model\n\nhint: \`?model=\` takes the address of an ONNX file, or open one here`));
    return;
  }
  $('picker').replaceChildren(...models.map((model) => new Option(model.split('/').pop(), model)));
  $('picker-field').hidden = models.length < 2;
  const name = url.pathname.split('/').pop();
  await load(url, attempt(() => decodeURIComponent(name)) ?? name);
  if (teacher && page.info) {
    const loading = WorkerGenerator.load(address(teacher), { cache: true });
    loading.then(stage.setTeacher, stage.problem);
  }
}

/** The models beside the page, as scripts/web-demo lists them. */
async function listed() {
  const response = await fetch('models.json').catch(() => null);
  const list = response?.ok ? await response.json().catch(() => null) : null;
  return list?.models?.length ? list : { models: ['model.onnx'] };
}

function address(model) {
  return attempt(() => new URL(model, location.href));
}

/** Opens a file from the disk: a teacher goes beside the generator that is shown, everything else takes its place. */
async function open(file) {
  if (!file) return;
  const bytes = await file.arrayBuffer();
  if (page.info?.kind === 'generator') {
    const teacher = await WorkerGenerator.load(bytes).catch(() => null);
    if (teacher?.info.kind === 'teacher') {
      stage.setTeacher(teacher);
      return;
    }
    teacher?.free();
  }
  await load(bytes, file.name);
}

// Every model gets a worker of its own: the last one's memory goes, and a crash leaves nothing behind.
async function load(source, name) {
  const number = ++loads;
  page.generator?.free();
  images.end('loading');
  Object.assign(page, { info: null, generator: null, lastImages: [], lastRun: null });
  $('gallery').replaceChildren();
  $('status').textContent = '';
  for (const id of ['error', 'warning', 'model', 'save', 'class-field', 'morph']) $(id).hidden = true;
  $('loading').hidden = false;
  $('progress').removeAttribute('value');
  $('progress-text').textContent = `Loading ${name}…`;
  $('fields').disabled = true;
  try {
    const onProgress = (received, total) => number === loads && showProgress(received, total, name);
    const generator = await WorkerGenerator.load(source, { cache: true, onProgress });
    if (number === loads) ready(generator, name);
    else generator.free();
  } catch (error) {
    if (number === loads) fail(error);
  }
}

function showProgress(received, total, name) {
  if (total) {
    $('progress').max = total;
    $('progress').value = received;
  }
  $('progress-text').textContent = received === total
    ? `Preparing ${name}…`
    : `Loading ${name}: ${megabytes(received)}${total ? ` of ${megabytes(total)}` : ''}`;
}

function ready(generator, name) {
  const { info, bytes, milliseconds } = generator;
  Object.assign(page, { generator, info });
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
  showEngine(info);
  fillClasses(info.classes);
  $('fields').disabled = false;
  page.state = 'ready';
  stage.reset();
  images.generate();
  grow(generator);
}

/** More workers, each with the whole model, where it is small. */
async function grow(generator) {
  const workers = generator.bytes > SMALL ? 1 : Math.min(navigator.hardwareConcurrency ?? 1, MOST_WORKERS);
  try {
    await generator.grow(workers);
  } catch (error) {
    if (generator === page.generator) stage.problem(error);
  }
  if (generator === page.generator) showEngine(generator.info);
}

function showEngine({ threads, instructions }) {
  $('engine').textContent = `${threads === 1 ? 'One thread' : `${threads} threads`}, ${instructions}.`;
}

function fillClasses(classes) {
  $('class-field').hidden = !classes;
  const wanted = $('class').value || new URLSearchParams(location.hash.slice(1)).get('class') || '';
  const name = (i) => classes.names[i] ?? `class ${i}`;
  const options = Array.from({ length: classes?.count ?? 0 }, (_, i) => new Option(name(i), i));
  $('class').replaceChildren(new Option('each in turn', ''), ...options);
  $('class').value = options.some((o) => o.value === wanted) ? wanted : '';
}

function fail(error) {
  const [problem, ...hints] = error.message.split('\n\n');
  const nodes = [element('strong', capital(problem))];
  for (const hint of hints) nodes.push(element('p', capital(hint.replace(/^hint: /, ''))));
  $('error').replaceChildren(...nodes);
  $('error').hidden = false;
  for (const id of ['loading', 'morph']) $(id).hidden = true;
  $('status').textContent = '';
  $('fields').disabled = true;
  images.clear();
  images.end('failed');
}
