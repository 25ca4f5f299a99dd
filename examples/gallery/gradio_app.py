"""A small Gradio application: a number and its square."""

import gradio

page = gradio.Interface(
    lambda number: f"The square is {number**2:g}",
    gradio.Number(6, label="Number"),
    gradio.Textbox(label="Square"),
    title="Squares",
)
page.launch()
