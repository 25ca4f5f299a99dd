"""A small Streamlit application: a number and its square."""

import streamlit

streamlit.title("Squares")
number = streamlit.number_input("Number", value=6)
streamlit.write(f"The square is {number * number}")
