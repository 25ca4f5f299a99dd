"""A small Dash application: a number and its square."""

from dash import Dash, Input, Output, callback, dcc, html

app = Dash(title="Squares")
server = app.server  # for gunicorn
app.layout = html.Div(
    [
        html.H1("Squares"),
        dcc.Input(id="number", type="number", value=6),
        html.P(id="square"),
    ]
)


@callback(Output("square", "children"), Input("number", "value"))
def square(number):
    """Return the text below the input."""
    return "no number" if number is None else f"The square is {number * number}"
