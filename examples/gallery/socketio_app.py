"""A small Flask-SocketIO application that sends back what it gets.  The page speaks Engine.IO's protocol without a library."""

import flask
import flask_socketio

PAGE = """<!doctype html><title>Echo</title><h1>Echo</h1>
<form id=form><input id=text aria-label=Text><button>Send</button></form><p id=answer></p>
<script>
let socket;
function connect() {
  socket = new WebSocket(location.origin.replace("http", "ws") + "/socket.io/?EIO=4&transport=websocket");
  socket.onmessage = ({data}) => {
    if (data[0] == "0") socket.send("40");            // open: join the default namespace
    else if (data == "2") socket.send("3");           // ping, pong
    else if (data.startsWith("42")) answer.textContent = JSON.parse(data.slice(2))[1];
  };
  socket.onclose = () => setTimeout(connect, 500);
}
connect();
form.onsubmit = () => { socket.send("42" + JSON.stringify(["say", text.value])); return false; };
</script>"""

app = flask.Flask(__name__)
socketio = flask_socketio.SocketIO(app, async_mode="threading")


@app.get("/")
def index():
    """Return the page."""
    return PAGE


@socketio.on("say")
def say(text):
    """Send a message back."""
    flask_socketio.emit("said", f"You said {text}")
