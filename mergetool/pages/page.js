"use strict";
for (const figure of document.querySelectorAll("figure.table")) {
  const body = figure.querySelector("tbody"), heads = [...figure.querySelectorAll("th")];
  const show = Number(figure.dataset.show), rows = [...body.rows];
  let all = false;
  const cut = () => [...body.rows].forEach((row, place) => { row.hidden = !all && place >= show; });
  const key = (row, place) => {
    const cell = row.cells[place];
    return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
  };
  const absent = (row, place) => row.cells[place].classList.contains("n") && !("v" in row.cells[place].dataset);
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort"), first = head.classList.contains("n") ? "descending" : "ascending";
      const other = first === "descending" ? "ascending" : "descending";
      const now = was === first ? other : first, sign = now === "ascending" ? 1 : -1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", now);
      const sorted = [...rows].sort((a, b) => absent(a, place) - absent(b, place)
        || sign * compare(key(a, place), key(b, place)));
      body.append(...sorted);
      cut();
    });
  });
  if (rows.length <= show + 2) continue;
  const more = document.createElement("button");
  more.type = "button";
  more.className = "more";
  const label = () => { more.textContent = all ? `show the first ${show} only` : `show all ${rows.length} rows`; };
  more.addEventListener("click", () => { all = !all; cut(); label(); });
  figure.append(more);
  cut();
  label();
}
