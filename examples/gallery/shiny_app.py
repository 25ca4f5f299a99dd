"""A small Shiny application: a number and its square."""

from shiny import App, render, ui

app_ui = ui.page_fluid(ui.h1("Squares"), ui.input_numeric("number", "Number", 6), ui.output_text("square"))


def server(inputs, outputs, session):
    """Connect the outputs of one browser's session."""

    @render.text
    def square():
        return f"The square is {inputs.number() ** 2}"


app = App(app_ui, server)
