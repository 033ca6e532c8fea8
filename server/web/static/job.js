// The overview of a job: curves and progress that follow the run's events.
import { connection, duration, request, showMessage } from "./app.js";
import { Chart } from "./chart.js";
import { CurveStore } from "./curve_store.js";
import { LiveEvents } from "./live_events.js";

const DRAW_MILLISECONDS = 200;
const MAX_RECENT = 8;
const MAX_SAMPLES = 6;

const DEFINITIONS = [
  { title: "Loss", unit: "plain", isLoss: true, isLarge: true, curves: [{ name: "loss", label: "Training loss", smooth: true }, { name: "eval_loss", label: "Held-out loss", hasPoints: true }] },
  { title: "Learning rate", unit: "plain", curves: [{ name: "learning_rate", label: "Learning rate" }] },
  { title: "Gradient norm", unit: "plain", curves: [{ name: "grad_norm", label: "Gradient norm", smooth: true }] },
  { title: "Speed", unit: "count", fromZero: true, curves: [{ name: "tokens_per_second", label: "Tokens per second" }] },
  { title: "Model FLOPs utilization", unit: "share", fromZero: true, curves: [{ name: "mfu", label: "MFU" }] },
  { title: "Peak memory", unit: "bytes", fromZero: true, curves: [{ name: "peak_memory_bytes", label: "First process" }] },
  { title: "GPU utilization", unit: "share", fromZero: true, top: 1, curves: [{ name: "gpu_utilization", label: "Mean of the job’s GPUs" }] },
  { title: "GPU memory", unit: "bytes", fromZero: true, curves: [{ name: "gpu_memory_bytes", label: "In use on the fullest GPU" }] },
  { title: "CPU of the worker", unit: "share", fromZero: true, top: 1, curves: [{ name: "worker_cpu", label: "Cores in use" }] },
  { title: "Memory of the worker", unit: "bytes", fromZero: true, curves: [{ name: "worker_memory_bytes", label: "In use by all programs" }] },
  { title: "Time outside the computation", unit: "share", fromZero: true, curves: [{ name: "data_wait_share", label: "Waiting for data" }, { name: "checkpoint_blocked_share", label: "Saving checkpoints" }] },
  { title: "Perplexity of the held-out data", unit: "plain", isLoss: true, curves: [{ name: "perplexity", label: "Perplexity", hasPoints: true }] },
  { title: "Rewards", unit: "plain", curves: [{ name: "rewards_chosen", label: "Chosen or desirable", smooth: true }, { name: "rewards_rejected", label: "Rejected or undesirable", smooth: true }, { name: "rewards_margin", label: "Margin", smooth: true }] },
  { title: "Reward accuracy", unit: "share", fromZero: true, curves: [{ name: "rewards_accuracy", label: "Training", smooth: true }, { name: "eval_rewards_accuracy", label: "Held out", hasPoints: true }] },
];
const NAMES = ["tokens", ...DEFINITIONS.flatMap(({ curves }) => curves.map(({ name }) => name))];

const section = document.getElementById("curves");
const container = document.getElementById("charts");
const state = document.getElementById("charts-state");
const form = document.getElementById("chart-options");
const store = new CurveStore(NAMES);
const charts = DEFINITIONS.map((definition) => new Chart(definition, { zoom }));
let range = null; // of the x axis; null: the whole run
let loadedSeq = 0;
let buffered = null; // events that arrive while the curves are loaded
let loadNumber = 0;
let drawTimer;

const options = () => ({ x: form.elements.x.value, smoothing: Number(form.elements.smoothing.value), log: form.elements.log.checked });

async function load() {
  const number = ++loadNumber;
  const { x } = options();
  const query = new URLSearchParams({ x, ...(range && { first: range[0], last: range[1] }) });
  buffered ??= [];
  let response;
  try {
    response = await (await request(`${section.dataset.curves}?${query}`)).json();
  } catch (error) {
    if (number === loadNumber) state.textContent = `The curves could not be loaded: ${error.message}`;
    if (connection.isLost) setTimeout(() => number === loadNumber && load(), 2000);
    throw error;
  }
  if (number !== loadNumber) return;
  store.load(response, x);
  loadedSeq = response.last_seq;
  const waiting = buffered;
  buffered = null;
  waiting.forEach(addToCurves);
  draw();
}

function addToCurves(event) {
  if (buffered) buffered.push(event);
  else if (event.seq > loadedSeq && !range) {
    if (store.add(event)) load().catch(() => {});
    else scheduleDraw();
  }
}

function scheduleDraw() {
  drawTimer ??= setTimeout(draw, DRAW_MILLISECONDS);
}

function draw() {
  clearTimeout(drawTimer);
  drawTimer = undefined;
  container.setAttribute("aria-busy", "false");
  state.hidden = !store.isEmpty;
  const isLive = document.getElementById("job-header").dataset.live === "true";
  state.textContent = range ? "There are no values in this range." : isLive ? "The curves begin with the first step." : "The run ended before its first step.";
  for (const chart of charts) chart.draw(store, options());
}

function zoom(first, last) {
  range = first == null && last == null ? null : [first ?? 0, last ?? Number.MAX_SAFE_INTEGER];
  const shown = (value) => (value == null || value === Number.MAX_SAFE_INTEGER ? "" : String(options().x === "step" ? Math.round(value) : Number(value.toPrecision(6))));
  form.elements.first.value = shown(range?.[0]);
  form.elements.last.value = shown(range?.[1]);
  document.getElementById("reset-zoom").disabled = range === null;
  return load().catch(() => {});
}

form.addEventListener("change", ({ target }) => {
  if (target.name === "x") zoom(null, null);
  else if (target.name === "first" || target.name === "last") {
    const [first, last] = [form.elements.first, form.elements.last].map(({ value }) => (value === "" ? null : Number(value)));
    zoom(first, last);
  } else draw();
});
form.addEventListener("input", ({ target }) => target.name === "smoothing" && draw());
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("reset-zoom").addEventListener("click", () => zoom(null, null));
container.addEventListener("dblclick", () => zoom(null, null));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.forEach((chart) => chart.reset());
  draw();
});

// The progress in the header, from the events, so that many viewers cost the server nothing.
const count = new Intl.NumberFormat("en");
const short = (value) => (value >= 1e6 ? `${Number((value / 1e6).toPrecision(3))} M` : count.format(Math.round(value)));
const precise = (value) => String(Number(value.toPrecision(4)));
const PHASES = { fetching: "fetching files", loading_data: "reading data", loading_model: "loading the model", finding_learning_rate: "finding a learning rate", training: "training", evaluating: "evaluating", saving: "saving a checkpoint" };

function showProgress(event) {
  const values = {
    step: event.step == null ? null : count.format(event.step),
    total_steps: event.total_steps == null ? null : count.format(event.total_steps),
    loss: event.loss == null ? null : precise(event.recent_loss ?? event.loss),
    eval_loss: event.eval_loss == null ? null : precise(event.eval_loss),
    tokens_per_second: event.tokens_per_second == null ? null : short(event.tokens_per_second),
    tokens: event.tokens == null ? null : short(event.tokens),
    eta_seconds: event.eta_seconds == null ? null : duration(event.eta_seconds),
    phase: PHASES[event.phase] ?? event.phase,
  };
  for (const [name, value] of Object.entries(values)) {
    const element = document.querySelector(`#job-header [data-value=${name}]`);
    if (element && value != null) element.textContent = value;
  }
  if (event.step != null && event.total_steps) document.getElementById("job-progress").value = event.step / event.total_steps;
}

function describe(event) {
  switch (event.type) {
    case "checkpoint":
      return `${event.name} is stored`;
    case "status":
      return `${event.status}${event.reason ? ` (${event.reason.replaceAll("_", " ")})` : ""}`;
    default:
      return event.message ?? "";
  }
}

function showRecent(event) {
  const list = document.getElementById("recent-events");
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.className = "exact";
  time.dateTime = event.created_at;
  time.textContent = event.created_at.slice(11, 19);
  const kind = document.createElement("span");
  kind.className = `kind ${event.type}`;
  kind.textContent = event.type;
  item.append(time, kind, describe(event));
  list.querySelector("li.muted")?.remove();
  list.prepend(item);
  while (list.children.length > MAX_RECENT) list.lastElementChild.remove();
}

function showSample(event) {
  const quote = document.createElement("blockquote");
  const head = document.createElement("p");
  head.className = "muted";
  head.textContent = `Step ${count.format(event.step)}: ${event.prompt}`;
  quote.append(head, event.text);
  const list = document.getElementById("sample-list");
  list.prepend(quote);
  while (list.children.length > MAX_SAMPLES) list.lastElementChild.remove();
  document.getElementById("samples").hidden = false;
}

function onEvent(event) {
  if (event.type === "progress") {
    showProgress(event);
    addToCurves(event);
    return;
  }
  if (event.type === "sample") showSample(event);
  else showRecent(event);
  if (["status", "checkpoint", "warning", "error"].includes(event.type)) refreshHeader();
}

let headerTimer;
function refreshHeader() {
  headerTimer ??= setTimeout(() => {
    headerTimer = undefined;
    document.getElementById("job-header").dispatchEvent(new CustomEvent("refresh"));
  }, 150);
}

container.append(...charts.map((chart) => chart.element));
charts.forEach((chart) => (chart.element.hidden = true));
load()
  .catch(() => {})
  .then(() => {
    new LiveEvents(section.dataset.events, Math.max(loadedSeq, 0), {
      event: onEvent,
      end: () => {
        refreshHeader();
        draw();
      },
      lost: () => connection.lost(),
      works: () => connection.works(),
    });
  })
  .catch((error) => showMessage(error.message));
