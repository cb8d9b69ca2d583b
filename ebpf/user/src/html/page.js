'use strict';
// Draws each migration's timeline as SVG, zoomed by buttons, keys, drags, pinches and Ctrl + wheel.
const NS = 'http://www.w3.org/2000/svg';
const ROW = 18;
// How wide a timeline is drawn for paper, which then scales it.
const PAPER = 720;
const KINDS = { work: 'work', layer: 'layer', wait: 'waits', kernel: 'KVM ioctl', wire: 'message', dark: 'vCPU out' };
const data = JSON.parse(document.getElementById('data').textContent);

function time(ns) {
  const size = Math.abs(ns);
  if (size < 1e3) return `${Math.round(ns)} ns`;
  if (size < 1e6) return `${(ns / 1e3).toFixed(1)} µs`;
  if (size < 1e9) return `${(ns / 1e6).toFixed(3)} ms`;
  return `${(ns / 1e9).toFixed(3)} s`;
}

function make(parent, name, attributes, text) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// The first lane that is free from `at` on; lanes hold when they become free.
function lane(lanes, at, until) {
  let index = lanes.findIndex((free) => free <= at);
  if (index < 0) index = lanes.push(0) - 1;
  lanes[index] = until;
  return index;
}

// Rows with a title each: the spans of a side, its ioctls, the messages, the vCPUs.
function rows(migration) {
  const groups = [];
  for (const side of ['source', 'destination']) {
    const pieces = [];
    const blocks = [];
    let base = 0, height = 0;
    for (const span of migration.spans.filter((span) => span.side === side)) {
      // A root and what is inside it stay together; roots of several threads may overlap.
      if (span.depth === 0) {
        const block = blocks.find((block) => block.free <= span.at);
        if (block) block.free = span.at + span.took;
        base = block ? block.base : height;
        if (!block) blocks.push({ base, free: span.at + span.took });
      }
      const y = base + Math.min(span.depth, 30);
      height = Math.max(height, y + 1);
      pieces.push({ ...span, y });
    }
    if (pieces.length) groups.push({ title: side, pieces, height });
    const lanes = [];
    const ioctls = migration.ioctls.filter((ioctl) => ioctl.side === side)
      .map((ioctl) => ({ ...ioctl, y: Math.min(lane(lanes, ioctl.at, ioctl.at + ioctl.took), 3) }));
    if (ioctls.length) groups.push({ title: `${side}: KVM`, pieces: ioctls, height: Math.min(lanes.length, 4) });
  }
  const lanes = [];
  const wire = migration.spans.filter((span) => span.side === 'wire')
    .map((span) => ({ ...span, y: Math.min(lane(lanes, span.at, span.at + span.took), 3) }));
  if (wire.length) groups.push({ title: 'wire', pieces: wire, height: Math.min(lanes.length, 4) });
  const vcpus = migration.vcpus.map(([index, at, took], y) =>
    ({ side: 'guest', name: `vCPU ${index} dark`, detail: '', kind: 'dark', at, took, y, rc: null, lossy: false }));
  if (vcpus.length) groups.push({ title: 'guest', pieces: vcpus, height: vcpus.length });
  return groups;
}

function timeline(box, migration) {
  const groups = rows(migration);
  const whole = [0, Math.max(migration.end, 1)];
  const [from, length] = migration.downtime ?? whole;
  const dark = [from - length * 0.04, from + length * 1.04];
  let view = migration.downtime ? dark : whole;
  let chosen = null;

  box.textContent = '';
  const tools = document.createElement('div');
  tools.className = 'tools';
  const button = (text, action) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = text;
    button.onclick = action;
    tools.append(button);
  };
  if (migration.downtime) button('Blackout', () => show(dark));
  button('Whole migration', () => show(whole));
  button('+', () => zoom(0.5, 0.5));
  button('−', () => zoom(2, 0.5));
  const legend = document.createElement('span');
  legend.className = 'legend';
  for (const [kind, name] of Object.entries(KINDS)) {
    const entry = document.createElement('span');
    const mark = document.createElement('b');
    mark.style.background = `var(--${kind})`;
    entry.append(mark, name);
    legend.append(entry);
  }
  tools.append(legend);
  const svg = document.createElementNS(NS, 'svg');
  const said = document.createElement('div');
  said.className = 'said quiet';
  const hint = 'Drag to move, Ctrl + wheel or pinch to zoom, tap a span for its figures.'
    + (migration.left ? ` ${migration.left} spans are not drawn.` : '');
  said.textContent = hint;
  box.append(tools, svg, said);

  function show([start, end]) {
    const span = Math.min(Math.max(end - start, 200), (whole[1] - whole[0]) * 1.2);
    const middle = Math.min(Math.max((start + end) / 2, whole[0]), whole[1]);
    view = [middle - span / 2, middle + span / 2];
    draw();
  }
  function zoom(factor, at) {
    const [start, end] = view;
    const pivot = start + (end - start) * at;
    show([pivot - (pivot - start) * factor, pivot + (end - pivot) * factor]);
  }
  function draw(paper) {
    const width = Math.max(paper || svg.clientWidth || box.clientWidth || 800, 200);
    const [start, end] = view;
    const x = (ns) => (ns - start) / (end - start) * width;
    svg.textContent = '';
    let y = 16;
    const window = migration.downtime
      ? make(svg, 'rect', { class: 'window', x: x(from), width: Math.max(x(from + length) - x(from), 1), y }) : null;
    const losses = migration.losses.map(([at, took]) =>
      make(svg, 'rect', { class: 'losses', x: x(at), width: Math.max(x(at + took) - x(at), 1), y }));
    // Ticks at round times since the stop.
    const step = 10 ** Math.floor(Math.log10((end - start) / (width / 110)));
    const tick = [1, 2, 5, 10].map((n) => n * step).find((n) => n / (end - start) * width > 90);
    const lines = [];
    for (let ns = Math.ceil((start - from) / tick) * tick; ns <= end - from; ns += tick) {
      lines.push(make(svg, 'line', { x1: x(from + ns), x2: x(from + ns), y1: y }));
      make(svg, 'text', { class: 'quiet', x: x(from + ns) + 3, y: 11 }, ns ? `${ns > 0 ? '+' : '−'}${time(Math.abs(ns))}` : 'stop');
    }
    for (const { title, pieces, height } of groups) {
      y += 4;
      make(svg, 'text', { class: 'quiet', x: 2, y: y + 11 }, title);
      y += 15;
      for (const piece of pieces) {
        const left = Math.max(x(piece.at), -2), right = Math.min(x(piece.at + piece.took), width + 2);
        if (right < 0 || left > width) continue;
        const size = Math.max(right - left, 1);
        const bad = piece.rc !== null && piece.rc < 0;
        const top = y + piece.y * ROW;
        const rect = make(svg, 'rect', {
          class: `${bad ? 'bad' : piece.kind}${piece.lossy ? ' lossy' : ''}${piece === chosen ? ' hit' : ''}`,
          x: left, y: top, width: size, height: ROW - 2, rx: 2,
        });
        rect.piece = piece;
        const room = Math.floor((size - 6) / 6.2);
        if (room > 2) {
          const name = piece.name.length > room ? `${piece.name.slice(0, room - 1)}…` : piece.name;
          const on = bad || ['work', 'kernel', 'wire'].includes(piece.kind);
          const ink = piece.kind === 'dark' ? { fill: 'var(--ground)' } : {};
          make(svg, 'text', { class: on ? 'on' : '', x: Math.max(left, 0) + 3, y: top + 12, style: ink.fill ? `fill:${ink.fill}` : '' }, name);
        }
      }
      y += height * ROW;
    }
    for (const rect of [window, ...losses]) rect?.setAttribute('height', y - 16);
    for (const line of lines) line.setAttribute('y2', y);
    svg.setAttribute('viewBox', `0 0 ${width} ${y + 4}`);
    svg.setAttribute('height', y + 4);
  }
  function choose(piece) {
    chosen = piece;
    said.textContent = piece
      ? `${piece.side}: ${piece.name}${piece.detail ? ` (${piece.detail})` : ''}: ${time(piece.took)}, `
        + `${time(piece.at - from)} after the stop${piece.rc ? `, rc ${piece.rc}` : ''}`
        + (piece.lossy ? '; events were lost while it ran' : '')
      : hint;
    draw();
  }

  const pointers = new Map();
  let moved = 0;
  const at = (event) => (event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth;
  svg.onpointerdown = (event) => {
    pointers.set(event.pointerId, at(event));
    moved = 0;
    svg.setPointerCapture(event.pointerId);
  };
  svg.onpointermove = (event) => {
    if (!pointers.has(event.pointerId)) return;
    const before = pointers.get(event.pointerId), now = at(event);
    const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    pointers.set(event.pointerId, now);
    moved += Math.abs(now - before);
    const [start, end] = view;
    if (others.length) {
      const factor = Math.abs(before - others[0]) / Math.max(Math.abs(now - others[0]), 0.01);
      zoom(factor, others[0]);
    } else if (moved > 0.005) {
      const by = (before - now) * (end - start);
      show([start + by, end + by]);
    }
  };
  svg.onpointerup = svg.onpointercancel = (event) => {
    pointers.delete(event.pointerId);
    if (event.type === 'pointerup' && moved <= 0.005) {
      const hit = document.elementsFromPoint(event.clientX, event.clientY).find((element) => element.piece);
      choose(hit?.piece ?? null);
    }
  };
  svg.addEventListener('wheel', (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, at(event));
  }, { passive: false });
  box.onkeydown = (event) => {
    const by = (view[1] - view[0]) * 0.15;
    const action = {
      '+': () => zoom(0.5, 0.5), '=': () => zoom(0.5, 0.5), '-': () => zoom(2, 0.5), 0: () => show(dark),
      ArrowLeft: () => show(view.map((ns) => ns - by)), ArrowRight: () => show(view.map((ns) => ns + by)),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  };
  draw();
  return draw;
}

const drawn = new Map();
function open(index) {
  for (const section of document.querySelectorAll('.migration')) {
    section.hidden = Number(section.dataset.index) !== index;
  }
  const box = document.querySelector(`.timeline[data-index="${index}"]`);
  if (box && !drawn.has(index)) drawn.set(index, timeline(box, data[index]));
  drawn.get(index)?.();
}
const pick = document.getElementById('pick');
if (pick) pick.onchange = () => open(Number(pick.value));
addEventListener('resize', () => drawn.forEach((draw) => draw()));
addEventListener('beforeprint', () => drawn.forEach((draw) => draw(PAPER)));
addEventListener('afterprint', () => drawn.forEach((draw) => draw()));
open(0);
