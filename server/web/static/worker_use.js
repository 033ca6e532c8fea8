// The usage of a worker's machine over time: cores, memory and GPUs.
import { request } from "./app.js";
import { Chart } from "./chart.js";

const REFRESH_SECONDS = 15;
const NUM_COLOURS = 8;
const section = document.getElementById("use");
const form = document.getElementById("use-options");
const container = document.getElementById("charts");
const state = document.getElementById("charts-state");
let charts = [];
let layout;
let loadNumber = 0;

/** The charts for this machine: each GPU has a curve of its own. */
function definitions({ gpus }) {
  const label = (device) => (/^\d+$/.test(device) ? `GPU ${device}` : device); // a MIG instance has a UUID
  const curves = (prefix) => gpus.map(({ device }, index) => ({ name: `${prefix}-${index}`, label: label(device), color: (index % NUM_COLOURS) + 1 }));
  const machine = [
    { title: "CPU", unit: "share", top: 1, curves: [{ name: "cpu", label: "Cores in use" }] },
    { title: "Memory", unit: "bytes", curves: [{ name: "memory", label: "Memory in use" }] },
  ];
  const ofGpus = [
    { title: "GPU utilization", unit: "share", top: 1, curves: curves("utilization") },
    { title: "GPU memory", unit: "bytes", curves: curves("gpu-memory") },
  ];
  return gpus.length ? [...ofGpus, ...machine] : machine;
}

/** The arrays of the response as curves by name. */
function curves({ at, cpu, memory_bytes: memory, gpus, interval_seconds: interval }) {
  const x = at.map((time) => Date.parse(time) / 1000);
  const curve = (values) => {
    const known = x.map((time, index) => [time, values[index]]).filter(([, value]) => value != null);
    return { x: known.map(([time]) => time), y: known.map(([, value]) => value), maxGap: 2 * interval };
  };
  const result = { cpu: curve(cpu), memory: curve(memory) };
  gpus.forEach((gpu, index) => {
    result[`utilization-${index}`] = curve(gpu.utilization);
    result[`gpu-memory-${index}`] = curve(gpu.memory_bytes);
  });
  return result;
}

function show(response) {
  const devices = JSON.stringify(response.gpus.map(({ device }) => device));
  if (devices !== layout) {
    layout = devices;
    charts.forEach((chart) => chart.element.remove());
    charts = definitions(response).map((definition) => new Chart({ ...definition, fromZero: true }, {}));
    container.append(...charts.map((chart) => chart.element));
  }
  const store = { axis: "clock", restarts: [], curves: curves(response) };
  for (const chart of charts) chart.draw(store, {});
  container.setAttribute("aria-busy", "false");
  state.hidden = response.at.length > 0;
  state.textContent = "There are no measurements for this period.";
}

async function load() {
  const number = ++loadNumber;
  try {
    const response = await (await request(`${section.dataset.usage}?hours=${form.elements.hours.value}`)).json();
    if (number === loadNumber) show(response);
  } catch (error) {
    state.hidden = false;
    state.textContent = `The curves could not be loaded: ${error.message}`;
  }
}

form.addEventListener("change", load);
form.addEventListener("submit", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.forEach((chart) => chart.reset());
  load();
});
setInterval(() => document.hidden || load(), 1000 * REFRESH_SECONDS);
load();
