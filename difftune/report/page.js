// The tip that follows the pointer over a chart: for each curve the point nearest in x.
const tip = document.createElement("div");
tip.className = "tip";
document.body.append(tip);
for (const chart of document.querySelectorAll("svg.chart")) {
  const curves = [...chart.querySelectorAll(".curve")].map((path) => ({
    name: path.dataset.name, colour: path.getAttribute("stroke"), points: JSON.parse(path.dataset.points),
  }));
  const cross = chart.querySelector(".cross");
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const near = curves.filter((c) => c.points.length).map((c) => ({
      ...c, point: c.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)),
    }));
    if (!near.length) return;
    const at = near.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a)).point;
    cross.setAttribute("x1", at[0]);
    cross.setAttribute("x2", at[0]);
    cross.style.visibility = "visible";
    tip.replaceChildren();
    tip.append(`${chart.dataset.x} ${at[2]}`);
    for (const { name, colour, point } of near.slice(0, 14)) {
      const row = document.createElement("div");
      const mark = document.createElement("i");
      mark.style.background = colour;
      row.append(mark, `${name}  ${point[3]}`);
      tip.append(row);
    }
    tip.style.visibility = "visible";
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 10)}px`;
  });
  chart.addEventListener("pointerleave", () => {
    tip.style.visibility = "hidden";
    cross.style.visibility = "hidden";
  });
}
