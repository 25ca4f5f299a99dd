"""A small Panel application: a number and its square."""

import panel

panel.extension()
number = panel.widgets.IntInput(name="Number", value=6)
panel.Column("# Squares", number, panel.bind(lambda value: f"The square is {value * value}", number)).servable()
