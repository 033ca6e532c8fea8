// Moving through the list of jobs by keyboard. Letters act only while a job has the focus, so they disturb no other input.

const names = () => [...document.querySelectorAll("#jobs .name")];

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { activeElement } = document;
  const row = activeElement?.closest("#jobs tbody tr");
  if (!row && !(activeElement?.id === "search" && event.key === "ArrowDown")) return;
  const links = names();
  const current = row ? links.indexOf(row.querySelector(".name")) : -1;
  const target = { ArrowDown: current + 1, j: current + 1, ArrowUp: current - 1, k: current - 1, Home: 0, End: links.length - 1 }[event.key];
  if (event.key === "x" && activeElement.matches(".name")) row.querySelector("input").click();
  else if (target === -1) document.getElementById("search").focus();
  else if (target !== undefined) links[Math.min(target, links.length - 1)]?.focus();
  else return;
  event.preventDefault();
});
