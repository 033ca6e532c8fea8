// The page that compares jobs: draws the same curve of all jobs into one chart.
import { request } from "./app.js";
import { Chart } from "./chart.js";

const DEFINITIONS = [
  { name: "loss", title: "Loss", unit: "plain", isLoss: true, isLarge: true, smooth: true },
  { name: "eval_loss", title: "Held-out loss", unit: "plain", isLoss: true, isLarge: true, hasPoints: true },
  { name: "learning_rate", title: "Learning rate", unit: "plain" },
  { name: "grad_norm", title: "Gradient norm", unit: "plain", smooth: true },
  { name: "tokens_per_second", title: "Tokens per second", unit: "count", fromZero: true },
  { name: "peak_memory_bytes", title: "Peak memory", unit: "bytes", fromZero: true },
];
const jobs = [...document.querySelectorAll(".compared")].map(({ dataset }) => ({ url: dataset.curves, name: dataset.name }));
const form = document.getElementById("chart-options");
const container = document.getElementById("charts");
const state = document.getElementById("charts-state");
let responses = [];
let range = null;

const charts = DEFINITIONS.map((definition) => {
  const curves = jobs.map(({ name }, index) => ({ name: `${definition.name}-${index}`, label: name, smooth: definition.smooth, hasPoints: definition.hasPoints }));
  return new Chart({ ...definition, curves }, { zoom: (first, last) => load([first, last]) });
});
container.append(...charts.map((chart) => chart.element));

function draw() {
  const options = { smoothing: Number(form.elements.smoothing.value), log: form.elements.log.checked };
  const curves = {};
  for (const { name } of DEFINITIONS) responses.forEach((response, index) => (curves[`${name}-${index}`] = response.curves[name] ?? { x: [], y: [] }));
  for (const chart of charts) chart.draw({ axis: form.elements.x.value, restarts: [], curves }, options);
  state.hidden = Object.values(curves).some(({ x }) => x.length);
  state.textContent = "None of these jobs has a curve in this range.";
  container.setAttribute("aria-busy", "false");
}

async function load(chosen = null) {
  range = chosen;
  const query = new URLSearchParams({ x: form.elements.x.value, ...(range && { first: range[0], last: range[1] }) });
  try {
    responses = await Promise.all(jobs.map(async ({ url }) => (await request(`${url}?${query}`)).json()));
    draw();
  } catch (error) {
    state.hidden = false;
    state.textContent = `The curves could not be loaded: ${error.message}`;
  }
}

form.addEventListener("change", ({ target }) => (target.name === "x" ? load() : draw()));
form.addEventListener("input", ({ target }) => target.name === "smoothing" && draw());
form.addEventListener("submit", (event) => event.preventDefault());
container.addEventListener("dblclick", () => load());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.forEach((chart) => chart.reset());
  draw();
});
load();
