// Search and filter of the gallery: hides the cards that are not meant, and says how many are left. What is asked for
// is in the address, so that it can be linked to.
const form = document.getElementById("filter");
const cards = [...document.querySelectorAll(".method")];

function meant(card, { words, family, start, rank }) {
  const text = card.textContent.toLowerCase();
  const lora = Number(/rank-(\d+)/.exec(card.className)?.[1] ?? Infinity);
  return (
    words.toLowerCase().split(/\s+/).every((word) => text.includes(word)) &&
    (!family || card.classList.contains(family)) &&
    (!start || card.classList.contains(start)) &&
    (!rank || (rank === "none" ? lora === Infinity : lora <= Number(rank)))
  );
}

function filter() {
  const asked = Object.fromEntries(new FormData(form));
  for (const card of cards) card.hidden = !meant(card, asked);
  for (const section of document.querySelectorAll("section section"))
    section.hidden = !section.querySelector(".method:not([hidden])");
  form.querySelector("output").value = `${cards.filter((card) => !card.hidden).length} of ${cards.length} methods`;
  const query = new URLSearchParams(Object.entries(asked).filter(([, value]) => value));
  history.replaceState(null, "", (query.size ? `?${query}` : location.pathname) + location.hash);
}

for (const [name, value] of new URLSearchParams(location.search)) if (form.elements[name]) form.elements[name].value = value;
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter)); // when the fields are empty
form.addEventListener("submit", (event) => event.preventDefault());
filter();
