// Sort a table by the column whose heading is pressed; numbers by their exact value in data-k.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, column) => row.cells[column].dataset.k ?? row.cells[column].textContent;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a, column), y = key(b, column), difference = Number(x) - Number(y);
        return sign * (Number.isNaN(difference) ? x.localeCompare(y, "en", { numeric: true }) : difference);
      });
      body.append(...rows);
    });
  });
}
// On paper every folded part is shown.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
