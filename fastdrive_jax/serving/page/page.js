// The page of `fastdrive serve`: plays frames to /v1/plan and shows what comes back.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const STAGES = ["receive", "decode", "queue", "model"];
const SHOWN = 60; // frames of the history
const DRIVE = `page-${Math.random().toString(36).slice(2, 10)}`;
const GONE = new Error("The service does not answer; this page goes on as soon as it does.");
// Where each camera stands on the page, as seen from the car.
const PLACES = [
  "CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT",
];

let info;
let frames = { count: 0, period: 0.2, get: async () => null }; // what is played
let playing = false;
let busy = false;
let again = false; // something changed while a plan was on its way
let wanted = false; // the reader asked for playing, or the page did at the start
let number = 0; // of the next frame in this page's drive, which 0 begins anew
let last = null; // {pictures, driven, answer}
const spent = [];

start();

async function start() {
  info = await whenReady();
  $("about").textContent =
    `${info.cameras.length} camera${info.cameras.length > 1 ? "s" : ""}, ` +
    `${info.visual_tokens} visual tokens, pruned by ${info.method}`;
  makeCameras();
  makeBudget();
  info.demo.forEach((one, number) => addSource(`${one.name} (demo)`, number));
  if (info.demo.length) {
    await choose("0");
    play(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  } else {
    say("No demo drive is available: drop frames of your own.");
  }
}

async function whenReady() {
  for (;;) {
    try {
      const found = await (await fetch("/v1/info")).json();
      pill(found.progress, found.ready ? "ready" : "waiting");
      document.querySelector("main").inert = !found.ready;
      say(found.ready ? "" : "The service is compiling its programs; the drive starts when they are ready.");
      if (found.ready) return found;
    } catch {
      pill("no connection", "waiting");
      document.querySelector("main").inert = true;
    }
    await sleep(1000);
  }
}

// Sources of frames

function addSource(text, value) {
  const option = new Option(text, value);
  $("source").add(option);
  return option;
}

async function choose(value) {
  $("source").value = value;
  if (value !== "own") {
    const demo = info.demo[Number(value)];
    frames = { ...demo, count: demo.frames, get: (frame) => demoFrame(Number(value), frame) };
  } else {
    frames = own;
  }
  $("place").max = frames.count - 1;
  await rewind();
}

async function rewind() {
  number = 0;
  spent.length = 0;
  place(0);
  await show();
}

async function demoFrame(number, frame) {
  const base = `/v1/demo/${number}/${frame}`;
  const told = await (await drawn(base)).json();
  const blobs = await Promise.all(
    info.cameras.map(async (name) => (await drawn(`${base}/${name}`)).blob()),
  );
  return { ...told, blobs };
}

async function drawn(address) {
  const answer = await ask(address);
  if (!answer.ok) throw new Error("The service cannot draw this frame; its log says why.");
  return answer;
}

let own = null;

function take(list) {
  const files = [...list].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  const groups = info.cameras.map((name) => files.filter((file) => cameraOf(file.name) === name));
  const named = groups.every((group) => group.length === groups[0].length && group.length);
  const count = named ? groups[0].length : files.length / info.cameras.length;
  if (!count || count % 1) {
    say(`A frame needs ${info.cameras.length} image${info.cameras.length > 1 ? "s" : ""} ` +
        `(${info.cameras.join(", ")}); ${files.length} files do not make whole frames.`);
    return;
  }
  const blobs = (frame) => info.cameras.map((_, camera) =>
    named ? groups[camera][frame] : files[frame * info.cameras.length + camera]);
  own = {
    count,
    period: 0.5,
    get: async (frame) => ({
      blobs: blobs(frame),
      speed: Number($("speed").value),
      command: $("command").value,
      driven: [],
    }),
  };
  if (![...$("source").options].some((option) => option.value === "own")) {
    addSource("your own frames", "own");
  }
  $("drop-text").textContent = `${count} frame${count > 1 ? "s" : ""} loaded; drop others to replace them`;
  choose("own");
  play(count > 1);
}

// The longest camera name that a file's name holds; a single camera takes any file.
function cameraOf(name) {
  if (info.cameras.length === 1) return info.cameras[0];
  return info.cameras.filter((camera) => name.includes(camera)).sort((a, b) => b.length - a.length)[0];
}

// Playing

function play(on) {
  playing = on;
  $("play").textContent = on ? "Pause" : "Play";
  if (on && !wanted) run();
}

async function run() {
  wanted = true;
  while (playing) {
    const next = performance.now() + 1000 * frames.period;
    await forward();
    await sleep(Math.max(0, next - performance.now()));
    while (document.hidden && playing) await sleep(300);
  }
  wanted = false;
}

async function forward() {
  const at = Number($("place").value) + 1;
  if (at >= frames.count) return rewind();
  place(at);
  return show();
}

function place(frame) {
  $("place").value = frame;
  $("place-text").textContent = `${frame + 1} of ${frames.count}`;
}

async function show() {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  try {
    do {
      again = false;
      await plan(Number($("place").value));
    } while (again);
  } catch (error) {
    const played = playing;
    play(false);
    number = 0; // what the service knows of this frame is not known here
    say(error.message);
    if (error === GONE) {
      await whenBack();
      play(played);
    }
  } finally {
    busy = false;
  }
}

// A service that was started anew may have other cameras or ratios.
async function whenBack() {
  const what = ({ cameras, ratios, method, demo }) => JSON.stringify([cameras, ratios, method, demo]);
  if (what(await whenReady()) !== what(info)) location.reload();
}

async function ask(address, options) {
  try {
    return await fetch(address, options);
  } catch {
    throw GONE;
  }
}

async function plan(at) {
  const frame = await frames.get(at);
  if (!frame) return;
  const asked = { speed: frame.speed, command: frame.command, drive: DRIVE, frame: number };
  number += 1; // before the answer: who begins anew meanwhile sets it to 0
  if (byTarget()) asked.target_ms = Number($("target").value);
  else asked.keep_ratio = ratio();
  const form = new FormData();
  form.append("request", JSON.stringify(asked));
  info.cameras.forEach((name, camera) => form.append(name, frame.blobs[camera], `${name}.jpg`));
  const answer = await ask("/v1/plan", { method: "POST", body: form });
  const content = await answer.json();
  if (answer.status === 503) {
    say(content.error);
    number = Math.min(number, asked.frame);
    await sleep(1000 * Number(answer.headers.get("Retry-After") ?? 1));
    again = true;
    return;
  }
  if (!answer.ok) throw new Error(content.error);
  // The service too takes pictures as they are stored, whatever their EXIF says.
  const upright = { imageOrientation: "none" };
  const pictures = await Promise.all(frame.blobs.map((blob) => createImageBitmap(blob, upright)));
  last?.pictures.forEach((picture) => picture.close()); // megabytes that are not collected soon
  last = { pictures, driven: frame.driven, answer: content };
  spent.push(content.timings_ms.total);
  if (spent.length > SHOWN) spent.shift();
  say(content.notes.join(" "));
  draw();
}

// Drawing

function draw() {
  if (!last) return;
  const { answer } = last;
  info.cameras.forEach((name, camera) => drawCamera(name, last.pictures[camera], answer.kept[name]));
  drawMap(answer, last.driven);
  drawTimes(answer);
  document.body.dataset.kept = answer.kept_tokens; // for tests and style sheets
  document.body.dataset.frame = answer.frame;
}

function makeCameras() {
  const names = [...info.cameras];
  if (names.every((name) => PLACES.includes(name))) {
    names.sort((a, b) => PLACES.indexOf(a) - PLACES.indexOf(b));
  }
  $("cameras").classList.toggle("many", names.length > 1);
  for (const name of names) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.id = `canvas-${name}`;
    canvas.setAttribute("role", "img");
    const scale = Math.max(1, Math.ceil(800 / info.image_size[1]));
    canvas.height = info.image_size[0] * scale;
    canvas.width = info.image_size[1] * scale;
    const caption = document.createElement("figcaption");
    caption.append(span(name.replace("CAM_", "").replaceAll("_", " ").toLowerCase()), span(""));
    figure.append(canvas, caption);
    $("cameras").append(figure);
  }
}

function drawCamera(name, picture, kept) {
  const canvas = $(`canvas-${name}`);
  const context = canvas.getContext("2d");
  const [rows, columns] = info.token_grid;
  const [height, width] = [canvas.height / rows, canvas.width / columns];
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if ($("shade").checked && kept.length < rows * columns) {
    const all = new Path2D();
    all.rect(0, 0, canvas.width, canvas.height);
    for (const [row, column] of kept) all.rect(column * width, row * height, width, height);
    context.fillStyle = "rgba(10, 14, 20, 0.74)";
    context.fill(all, "evenodd");
    const edges = outline(kept, rows, columns, width, height);
    context.strokeStyle = "#ffd23f";
    context.lineWidth = Math.max(1.5, canvas.width / 480);
    context.stroke(edges);
  }
  const text = `${kept.length} of ${rows * columns} tokens`;
  canvas.setAttribute("aria-label", `${name}: ${text} kept`);
  canvas.nextElementSibling.lastElementChild.textContent = text;
}

// The border between kept and pruned tokens.
function outline(kept, rows, columns, width, height) {
  const is = new Set(kept.map(([row, column]) => row * columns + column));
  const has = (row, column) =>
    row >= 0 && row < rows && column >= 0 && column < columns && is.has(row * columns + column);
  const path = new Path2D();
  const line = (x0, y0, x1, y1) => {
    path.moveTo(x0 * width, y0 * height);
    path.lineTo(x1 * width, y1 * height);
  };
  for (const [row, column] of kept) {
    if (!has(row - 1, column)) line(column, row, column + 1, row);
    if (!has(row + 1, column)) line(column, row + 1, column + 1, row + 1);
    if (!has(row, column - 1)) line(column, row, column, row + 1);
    if (!has(row, column + 1)) line(column + 1, row, column + 1, row + 1);
  }
  return path;
}

function drawMap(answer, driven) {
  const map = $("map");
  const points = (way) => [[0, 0], ...way].map(([x, y]) => `${-y},${-x}`).join(" ");
  const far = Math.max(14, ...answer.waypoints.map(([x]) => x), ...driven.map(([x]) => x));
  const tall = Math.min(80, 10 * Math.ceil((far + 4) / 10)); // metres ahead that are shown
  const side = Math.max(...answer.waypoints.map(([, y]) => Math.abs(y)));
  const wide = Math.max(0.5 * (tall + 8), 2 * side);
  map.setAttribute("viewBox", `${-wide / 2 - 3} ${-tall} ${wide + 6} ${tall + 7}`);
  map.replaceChildren();
  for (let reach = 10; reach < tall; reach += 10) {
    add(map, "circle", { class: "ring", r: reach });
    add(map, "text", { x: -wide / 2 - 2, y: -reach + 0.5 }).textContent = `${reach} m`;
  }
  if (driven.length) add(map, "polyline", { class: "driven", points: points(driven) });
  add(map, "rect", { class: "car", x: -0.95, y: -3.5, width: 1.9, height: 4.1, rx: 0.6 });
  add(map, "rect", { class: "glass", x: -0.65, y: -2.6, width: 1.3, height: 0.7, rx: 0.2 });
  add(map, "polyline", { class: "plan", points: points(answer.waypoints) });
  answer.waypoints.forEach(([x, y]) => add(map, "circle", { class: "dot", cx: -y, cy: -x, r: 0.62 }));
  const [x, y] = answer.waypoints.at(-1);
  const aside = Math.abs(y) < 0.05 ? "" : `, ${Math.abs(y).toFixed(1)} m ${y > 0 ? "left" : "right"}`;
  $("map-text").textContent = `In ${answer.times.at(-1)} s: ${x.toFixed(1)} m ahead${aside}.`;
  $("waypoints").replaceChildren(
    ...answer.waypoints.map(([ahead, left], step) => {
      const row = document.createElement("tr");
      for (const value of [answer.times[step].toFixed(1), ahead.toFixed(2), left.toFixed(2)]) {
        row.append(cell(value));
      }
      return row;
    }),
  );
}

function drawTimes(answer) {
  const times = answer.timings_ms;
  $("total").textContent = times.total.toFixed(1);
  $("stages").replaceChildren(
    ...STAGES.map((stage) => {
      const bar = document.createElement("div");
      bar.className = stage;
      bar.style.flex = `0 0 ${(100 * times[stage]) / times.total}%`;
      return bar;
    }),
  );
  list($("stage-list"), STAGES.map((stage) => [stage, `${times[stage].toFixed(1)} ms`, stage]));
  const facts = [
    ["kept", `${Math.round(100 * answer.keep_ratio)}%, ${answer.kept_tokens} of ${answer.visual_tokens}`],
    ["memory", answer.memory],
    ["batch", answer.batch],
  ];
  if (answer.target_ms !== null) {
    facts.unshift(["target", `${answer.target_ms} ms ${answer.target_met ? "met" : "missed"}`]);
  }
  list($("facts"), facts);
  const most = 1.15 * Math.max(...spent, answer.target_ms ?? 0);
  const height = (ms) => 80 - (80 * ms) / most;
  const history = $("history");
  history.replaceChildren();
  const line = spent.map((ms, at) => `${(300 * at) / (SHOWN - 1)},${height(ms)}`).join(" ");
  if (answer.target_ms !== null) {
    const y = height(answer.target_ms);
    add(history, "line", { class: "target", x1: 0, x2: 300, y1: y, y2: y });
  }
  add(history, "polyline", { points: line });
  const middle = [...spent].sort((a, b) => a - b)[Math.floor(spent.length / 2)];
  $("history-text").textContent =
    `The last ${spent.length} frames: median ${middle.toFixed(1)} ms, ` +
    `highest ${Math.max(...spent).toFixed(1)} ms` +
    (answer.target_ms === null ? "." : ", target dashed.");
}

// Budget

function makeBudget() {
  const ratios = [...info.ratios].sort((a, b) => a - b);
  $("ratio").max = ratios.length - 1;
  $("ratio").value = ratios.indexOf(0.5) < 0 ? 0 : ratios.indexOf(0.5);
  $("ratio-marks").replaceChildren(...ratios.map((one) => span(`${Math.round(100 * one)}%`)));
  const measured = info.buckets.filter((one) => one.batch === 1).map((one) => one.median_ms);
  const slowest = Math.max(...measured);
  $("target").max = Math.max(100, 10 * Math.ceil((3 * slowest) / 10));
  $("target").value = info.target_ms ?? Math.ceil(1.5 * slowest);
  $("target-box").querySelector(".marks").lastElementChild.textContent = `${$("target").max} ms`;
  if (info.target_ms !== null) document.querySelector("[name=budget][value=target]").checked = true;
  tellBudget();
}

function ratio() {
  return [...info.ratios].sort((a, b) => a - b)[Number($("ratio").value)];
}

function byTarget() {
  return document.querySelector("[name=budget]:checked").value === "target";
}

function tellBudget() {
  const bucket = info.buckets.find((one) => one.batch === 1 && one.keep_ratio === ratio());
  const text = `${Math.round(100 * ratio())}%, ${bucket.tokens} tokens`;
  $("ratio-text").textContent = text;
  $("ratio").setAttribute("aria-valuetext", text);
  $("target-text").textContent = `${$("target").value} ms`;
  $("target").setAttribute("aria-valuetext", `${$("target").value} milliseconds`);
  $("ratio-box").hidden = byTarget();
  $("target-box").hidden = !byTarget();
}

// Small things

function pill(text, kind) {
  $("state").textContent = text;
  $("state").className = `pill ${kind}`;
}

function say(text) {
  if ($("notes").textContent !== text) $("notes").textContent = text;
}

function list(place, pairs) {
  place.replaceChildren(
    ...pairs.map(([name, value, colour]) => {
      const [row, term, told] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
      if (colour) {
        const key = span("");
        key.className = `key ${colour}`;
        term.append(key);
      }
      term.append(name);
      told.textContent = value;
      row.append(term, told);
      return row;
    }),
  );
}

function add(parent, tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function span(text) {
  const node = document.createElement("span");
  node.textContent = text;
  return node;
}

function cell(text) {
  const node = document.createElement("td");
  node.textContent = text;
  return node;
}

function sleep(ms) {
  return new Promise((done) => setTimeout(done, ms));
}

$("play").addEventListener("click", () => play(!playing));
$("step").addEventListener("click", () => {
  play(false);
  forward();
});
$("again").addEventListener("click", rewind);
$("source").addEventListener("change", () => choose($("source").value));
$("place").addEventListener("input", () => {
  place(Number($("place").value));
  number = 0; // what is remembered belongs to the frame before
  if (!playing) show();
});
for (const id of ["ratio", "target"]) {
  $(id).addEventListener("input", () => {
    tellBudget();
    if (!playing) show();
  });
}
document.querySelectorAll("[name=budget]").forEach((radio) =>
  radio.addEventListener("change", () => {
    tellBudget();
    if (!playing) show();
  }),
);
$("shade").addEventListener("change", draw);
for (const id of ["speed", "command"]) {
  $(id).addEventListener("change", () => {
    if (!playing && $("source").value === "own") show();
  });
}
$("files").addEventListener("change", () => take($("files").files));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && info && event.dataTransfer.files.length) take(event.dataTransfer.files);
  });
}
