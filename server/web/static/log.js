// A job's log: follows the output, searches it, and keeps the newest lines.
import { connection, request } from "./app.js";

const MAX_LINES = 20_000;
const QUIET_SECONDS = 20;
const RETRY_MILLISECONDS = 2000;
const ESCAPE_SEQUENCES = /\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\))/g; // colours and titles of terminals

const section = document.getElementById("log");
const output = document.getElementById("log-text");
const state = document.getElementById("log-state");
const form = document.getElementById("log-options");
let lines = [""];
let numRemoved = 0;
let numBytes = 0;
let reader = null; // the AbortController of the open response
let redrawTimer;

const isLive = () => document.getElementById("job-header").dataset.live === "true";

function append(text) {
  const parts = text.replace(ESCAPE_SEQUENCES, "").replaceAll("\r\n", "\n").split("\n");
  lines[lines.length - 1] += parts[0];
  lines.push(...parts.slice(1));
  if (lines.length > MAX_LINES) {
    numRemoved += lines.length - MAX_LINES;
    lines = lines.slice(-MAX_LINES);
  }
  redrawTimer ??= setTimeout(redraw, 100);
}

function redraw() {
  clearTimeout(redrawTimer);
  redrawTimer = undefined;
  const wanted = form.elements.search.value.toLowerCase();
  const isAtEnd = form.elements.follow.checked;
  const top = output.scrollTop;
  const content = document.createDocumentFragment();
  let numMatches = 0;
  let plain = ""; // consecutive ordinary lines become one text node
  const flush = () => {
    if (plain) content.append(plain);
    plain = "";
  };
  lines.forEach((line, number) => {
    // A carriage return starts a line again, as progress bars do.
    const text = line.slice(line.lastIndexOf("\r", line.length - 2) + 1);
    const end = number < lines.length - 1 ? "\n" : "";
    const isMatch = wanted !== "" && text.toLowerCase().includes(wanted);
    if (isMatch) numMatches += 1;
    else if (wanted && form.elements.matching.checked) return;
    if (isMatch) {
      flush();
      content.append(...marked(text, wanted), end);
    } else if (text.startsWith("=== attempt ")) {
      flush();
      const heading = document.createElement("span");
      heading.className = "mark-line";
      heading.textContent = text;
      content.append(heading, end);
    } else plain += text + end;
  });
  flush();
  output.replaceChildren(content);
  output.scrollTop = isAtEnd ? output.scrollHeight : top;
  const size = `${(lines.length - (lines.at(-1) === "" ? 1 : 0) + numRemoved).toLocaleString("en")} lines`;
  const found = wanted ? `, ${numMatches.toLocaleString("en")} with “${form.elements.search.value}”` : "";
  const cut = numRemoved ? `, the first ${numRemoved.toLocaleString("en")} are only in the download` : "";
  state.textContent = numBytes === 0 ? (isLive() ? "No output yet." : "The job has no output.") : size + found + cut;
}

function* marked(text, wanted) {
  let rest = text;
  for (let at = rest.toLowerCase().indexOf(wanted); at >= 0; at = rest.toLowerCase().indexOf(wanted)) {
    const mark = document.createElement("mark");
    mark.textContent = rest.slice(at, at + wanted.length);
    yield rest.slice(0, at);
    yield mark;
    rest = rest.slice(at + wanted.length);
  }
  yield rest;
}

/** Read from the current offset; a live log continues until there is no output for some time. */
async function read() {
  if (reader || document.hidden) return;
  const controller = (reader = new AbortController());
  const query = new URLSearchParams({ offset: numBytes, ...(isLive() && { follow: true, quiet_seconds: QUIET_SECONDS }) });
  const wasLive = isLive();
  let delay = 0;
  try {
    const response = await request(`${section.dataset.log}?${query}`, { signal: controller.signal });
    const decoder = new TextDecoder();
    for (const stream = response.body.getReader(); ; ) {
      const { done, value } = await stream.read();
      if (done) break;
      numBytes += value.length;
      append(decoder.decode(value, { stream: true }));
    }
    connection.works();
  } catch (error) {
    if (error.name !== "AbortError") {
      connection.lost();
      delay = RETRY_MILLISECONDS;
    }
  }
  reader = null;
  redraw();
  document.getElementById("job-header").dispatchEvent(new CustomEvent("refresh"));
  if (wasLive || delay) setTimeout(read, delay || 500);
}

form.addEventListener("input", redraw);
form.addEventListener("submit", (event) => event.preventDefault());
output.addEventListener("wheel", ({ deltaY }) => deltaY < 0 && (form.elements.follow.checked = false), { passive: true });
document.addEventListener("visibilitychange", () => (document.hidden ? reader?.abort() : read()));
read();
