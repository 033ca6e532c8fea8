// Chat with a job's newest checkpoint, and side by side with the model before training.
import { request, showMessage } from "./app.js";

const section = document.getElementById("chat");
const form = document.getElementById("ask");
const state = document.getElementById("chat-state");
const stop = document.getElementById("stop");
let controller = null; // of the answers that are being written

const panels = [...(section?.querySelectorAll("[data-model]") ?? [])].map((element) => ({
  element,
  model: element.dataset.model,
  list: element.querySelector(".turns"),
  messages: [],
}));

function addTurn(panel, role, text) {
  const turn = document.createElement("p");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  panel.list.append(turn);
  panel.list.scrollTop = panel.list.scrollHeight;
  return turn;
}

/** Ask one model; the answer appears while it is written. */
async function ask(panel, question, options, signal) {
  panel.messages.push({ role: "user", content: question });
  addTurn(panel, "user", question);
  const turn = addTurn(panel, "assistant", "");
  let text = "";
  try {
    const response = await request(section.dataset.chat, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: panel.model, messages: panel.messages, stream: true, ...options }),
      signal,
    });
    const decoder = new TextDecoder();
    let rest = "";
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.replace(/^data: ?/, "");
        if (!block.startsWith("data:") || data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        text += chunk.choices?.[0]?.delta?.content ?? "";
        turn.textContent = text;
        panel.list.scrollTop = panel.list.scrollHeight;
      }
    }
    panel.messages.push({ role: "assistant", content: text });
    if (!text) turn.textContent = "(The model gave an empty answer.)";
  } catch (error) {
    panel.messages.pop();
    if (error.name === "AbortError") turn.textContent = `${text} (stopped)`;
    else {
      turn.className = "turn failed";
      turn.textContent = error.message;
    }
  }
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (controller) return;
  const question = form.elements.question.value.trim();
  if (!question) return;
  form.elements.question.value = "";
  controller = new AbortController();
  stop.hidden = false;
  state.textContent = "The first answer takes longer, because the model is loaded.";
  const options = { temperature: Number(form.elements.temperature.value), max_tokens: Number(form.elements.max_tokens.value) };
  for (const panel of panels.filter(({ element }) => !element.hidden)) await ask(panel, question, options, controller.signal);
  controller = null;
  stop.hidden = true;
  state.textContent = "";
  form.elements.question.focus();
});
form?.elements.question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    form.requestSubmit();
  }
});
form?.elements.base?.addEventListener("change", ({ target }) => (panels[1].element.hidden = !target.checked));
stop?.addEventListener("click", () => controller?.abort());
document.getElementById("forget")?.addEventListener("click", () => {
  controller?.abort();
  for (const panel of panels) {
    panel.messages = [];
    panel.list.replaceChildren();
  }
});
addEventListener("unhandledrejection", ({ reason }) => showMessage(String(reason?.message ?? reason)));
