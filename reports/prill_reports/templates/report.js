"use strict";
const box = document.querySelector(".find"), field = box.querySelector("input"), told = box.querySelector("output");
const things = [...document.querySelectorAll(".finding, tbody tr")].filter((one) => !one.parentElement.closest(".finding"));
const folds = [...document.querySelectorAll("details")], opened = folds.map((one) => one.open);
box.hidden = false;
function search() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const one of things) {
    const text = one.textContent.toLowerCase();
    one.hidden = !words.every((word) => text.includes(word));
    found += words.length && !one.hidden ? 1 : 0;
  }
  folds.forEach((one, at) => {
    if (!one.matches(".finding")) one.open = words.length ? true : opened[at];
  });
  told.textContent = words.length ? `${found} found` : "";
}
field.addEventListener("input", search);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && event.target !== field) {
    event.preventDefault();
    field.focus();
  } else if (event.key === "Escape" && event.target === field) {
    field.value = "";
    search();
  }
});
