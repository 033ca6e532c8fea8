// What every page needs: the CSRF token of requests, messages, the state of the connection, ages, refreshing, shortcuts.

export const root = document.documentElement.dataset.root;
export const csrfToken = document.querySelector('meta[name="csrf-token"]')?.content;
const AGE_SECONDS = 10;

/** fetch() with the CSRF token. Rejects with the server's sentence for an error response. */
export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { "X-CSRF-Token": csrfToken ?? "", ...options.headers } });
  } catch (error) {
    if (error.name !== "AbortError") connection.lost();
    throw error;
  }
  const isLoginPage = response.redirected && new URL(response.url).pathname === `${root}/login`;
  if (response.status === 401 || isLoginPage) connection.ended();
  else if (response.status >= 502) connection.lost();
  else connection.works();
  if (isLoginPage) throw new Error("Your session has ended.");
  if (!response.ok) throw new Error(await sentence(response));
  return response;
}

async function sentence(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return new DOMParser().parseFromString(text, "text/html").body.textContent.trim() || `The server answered ${response.status}.`;
  }
}

/** Shows a message above the page, for an error of something that the user did. */
export function showMessage(text, kind = "bad") {
  const paragraph = document.createElement("p");
  paragraph.className = `alert ${kind}`;
  paragraph.textContent = text;
  document.getElementById("messages").replaceChildren(paragraph);
}

/** The banner about a lost connection or an ended session. */
export const connection = {
  isLost: false,
  hasEnded: false,
  element: document.getElementById("connection"),
  lost() {
    this.isLost = true;
    this.show("The server can’t be reached. This page reconnects by itself.");
  },
  works() {
    if (this.isLost && !this.hasEnded) this.element.hidden = true;
    this.isLost = false;
  },
  ended() {
    this.hasEnded = true;
    const link = document.createElement("a");
    link.href = `${root}/login?next=${encodeURIComponent(location.pathname.slice(root.length) + location.search)}`;
    link.textContent = "Log in again";
    this.show("Your session has ended. ", link);
  },
  show(...content) {
    this.element.replaceChildren(...content);
    this.element.hidden = false;
  },
};

document.addEventListener("htmx:config:request", (event) => {
  if (csrfToken) event.detail.ctx.request.headers["X-CSRF-Token"] = csrfToken;
});
document.addEventListener("htmx:after:request", (event) => {
  const { ctx } = event.detail;
  if (ctx.response.status >= 502) connection.lost();
  else connection.works();
});
document.addEventListener("htmx:response:error", async (event) => {
  const { ctx } = event.detail;
  if (ctx.response.status === 401) return connection.ended();
  const isRefresh = ctx.sourceElement?.matches("[hx-trigger=refresh]");
  if (!isRefresh) showMessage(await sentence(new Response(ctx.text, { status: ctx.response.status })));
});
document.addEventListener("htmx:error", () => connection.lost());

// Parts of a page that show a changing state are refreshed while the page is visible.
function refresh(element) {
  const isSelecting = element.querySelector("input:checked") || element.contains(document.activeElement?.closest("form"));
  if (!document.hidden && !isSelecting) {
    element.dispatchEvent(new CustomEvent("refresh"));
  }
}
for (const element of document.querySelectorAll("[data-refresh-seconds]")) {
  const { id } = element;
  const seconds = Number(element.dataset.refreshSeconds);
  setInterval(() => refresh(document.getElementById(id)), 1000 * seconds);
  document.addEventListener("visibilitychange", () => refresh(document.getElementById(id)));
}

// On narrow screens, the current one of many links may be outside the visible part of its row.
// (scrollIntoView would also scroll the page down to it.)
for (const link of document.querySelectorAll("nav [aria-current]")) {
  const row = link.closest("nav");
  const [inner, outer] = [link.getBoundingClientRect(), row.getBoundingClientRect()];
  row.scrollLeft += Math.max(0, inner.right - outer.right) - Math.max(0, outer.left - inner.left);
}

/** A duration in its largest units, like the filter of the templates. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return minutes < 10 && whole % 60 ? `${minutes} min ${whole % 60} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${Math.floor(hours / 24)} d`;
}

function updateAges() {
  for (const element of document.querySelectorAll("time[datetime]:not(.exact)")) {
    const age = (Date.now() - new Date(element.dateTime)) / 1000;
    const text = age < 5 ? "just now" : `${duration(age >= 60 && age < 3600 ? 60 * Math.floor(age / 60) : age)} ago`;
    if (element.textContent !== text) element.textContent = text;
  }
}
setInterval(updateAges, 1000 * AGE_SECONDS);

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select, [contenteditable]");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const field = document.querySelector(`[data-shortcut="${CSS.escape(event.key)}"]`);
  if (field) {
    event.preventDefault();
    field.focus();
  }
});
