// The form for a new job: shows the inputs of the chosen kinds, and checks the spec while the user types.

const CHECK_MILLISECONDS = 600;
const form = document.getElementById("new-job");
const check = document.getElementById("check");
let timer;

function showKinds() {
  for (const part of form.querySelectorAll("[data-kind]")) {
    const [group, kind] = part.dataset.kind.split(" ");
    part.hidden = form.elements[`${group}_kind`].value !== kind;
  }
  const isScratch = form.elements.model_kind?.value === "config";
  for (const part of form.querySelectorAll("[data-unless-scratch]")) part.hidden = isScratch;
  for (const part of form.querySelectorAll("[data-if-scratch]")) part.hidden = !isScratch;
}

/** The form has a model and data, or YAML; before that, a check would only repeat that they are missing. */
function isStarted() {
  const value = (name) => form.elements[name]?.value.trim();
  if (form.elements.yaml) return value("yaml") !== "";
  const data = form.elements.data_kind.value;
  return Boolean(value(`model_${form.elements.model_kind.value}`) && (data === "builtin" || value(`data_${data}`)));
}

function checkSoon(delay = CHECK_MILLISECONDS) {
  clearTimeout(timer);
  timer = setTimeout(() => isStarted() && check.dispatchEvent(new CustomEvent("check")), delay);
}

/** Marks the inputs that the listed faults are about, and opens their groups. */
function markFaults() {
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  for (const { dataset } of check.querySelectorAll("[data-param]")) {
    const [first] = dataset.param.split(".");
    const names = [`field.${dataset.param}`, `field.${first}`, dataset.param, `${first === "dataset" ? "data" : first}_${form.elements[`${first === "dataset" ? "data" : first}_kind`]?.value}`];
    const input = names.map((name) => form.elements[name]).find((element) => element instanceof HTMLElement);
    input?.setAttribute("aria-invalid", "true");
    input?.closest("details")?.setAttribute("open", "");
  }
}

form.addEventListener("input", () => checkSoon());
form.addEventListener("change", showKinds);
document.addEventListener("htmx:after:swap", markFaults);
// "Edit as YAML" and the button for a sweep leave this page with what was entered so far.
for (const button of form.querySelectorAll("[data-plain]")) {
  button.addEventListener("click", (event) => {
    event.preventDefault();
    form.action = button.getAttribute("formaction");
    HTMLFormElement.prototype.submit.call(form);
  });
}
if (!form.elements.yaml) showKinds();
checkSoon(0);
