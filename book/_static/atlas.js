// The design-space page: shows the rows of its table that match the search box, the axes and the check box.
document.addEventListener("DOMContentLoaded", () => {
  for (const atlas of document.querySelectorAll(".ttr-atlas")) {
    const rows = [...atlas.querySelectorAll("tbody tr")];
    const search = atlas.querySelector("[data-search]");
    const selects = [...atlas.querySelectorAll("[data-axis]")];
    const unnamed = atlas.querySelector("[data-unnamed]");
    const count = atlas.querySelector("[data-count]");
    const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

    const matches = (row) =>
      (unnamed.checked || row.dataset.published === "yes") &&
      selects.every((select) => !select.value || row.dataset[select.dataset.axis] === select.value) &&
      search.value.toLowerCase().split(/\s+/).every((word) => words.get(row).includes(word));

    const filter = () => {
      for (const row of rows) row.hidden = !matches(row);
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = `${shown} of ${rows.length} memories`;
    };
    atlas.addEventListener("input", filter);
    filter();
  }
});
