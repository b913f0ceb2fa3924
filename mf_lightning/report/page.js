for (const box of document.querySelectorAll(".samples")) {
  const sets = [...box.querySelectorAll(".pictures")];
  const slider = box.querySelector(".slider");
  if (!slider || sets.length < 2) continue;
  const input = slider.querySelector("input");
  const output = slider.querySelector("output");
  const show = () => {
    sets.forEach((set, number) => { set.hidden = number !== Number(input.value); });
    output.textContent = "step " + Number(sets[input.value].dataset.step).toLocaleString("en");
    input.setAttribute("aria-valuetext", output.textContent);
  };
  slider.hidden = false;
  input.addEventListener("input", show);
  show();
}
