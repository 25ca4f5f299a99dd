#!/bin/sh
# The probe for places without Python: the protocol of probe.py with busybox alone (ash, nc, and small tools).
#
#     probe.sh PORT [IGNORED...]
#
# What must survive a suspension lies in a directory in memory: $PROBE_TMP, else /dev/shm, else /run, else /tmp.
# Each request runs in a process of its own, so /memory is held by a helper process.

main() {
    if [ -n "$PROBE_EXIT" ]; then
        echo "last words"
        exit "$PROBE_EXIT"
    fi
    for dir in "$PROBE_TMP" /dev/shm /run /tmp; do
        [ -n "$dir" ] && [ -w "$dir" ] && break
    done
    export PROBE_STATE="$dir/probe.$$" PROBE_MAIN=$$
    mkdir -p "$PROBE_STATE" || exit 1
    head -c 8 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$PROBE_STATE/start"
    echo 0 >"$PROBE_STATE/count"
    exec 3<&0
    { cat <&3 >"$PROBE_STATE/stdin" && : >"$PROBE_STATE/stdin.end"; } &
    reader=$!
    nc -ll -p "$1" -e /bin/sh "$0" --answer 3<&- </dev/null &
    server=$!
    if [ -n "$PROBE_IGNORES_SIGTERM" ]; then
        trap '' TERM
    else
        trap 'saved; leave 0' TERM
    fi
    trap 'leave "$(cat "$PROBE_STATE/exit")"' USR1
    echo "probe is ready"
    while kill -0 "$server" 2>/dev/null; do
        wait "$server"
    done
    leave 1
}

saved() {
    [ -n "$DISPATCHER_DATA" ] && echo "signal 15" >"$DISPATCHER_DATA/saved"
}

leave() {
    kill -9 "$server" "$reader" 2>/dev/null
    if [ -e "$PROBE_STATE/holders" ]; then
        xargs kill -9 <"$PROBE_STATE/holders" 2>/dev/null
    fi
    rm -rf "$PROBE_STATE"
    exit "$1"
}

# -- one request ---------------------------------------------------------------------------------------------

argument() { # NAME: the decoded value of a query argument
    for pair in $(printf %s "$query" | tr '&' ' '); do
        case $pair in
        "$1="*) httpd -d "$(printf %s "${pair#*=}" | sed 's/%0[aA]/ /g')" && return ;;
        esac
    done
}

reply() { # STATUS: standard input is the body
    cat >"$PROBE_STATE/reply.$$"
    printf 'HTTP/1.1 %s X\r\nContent-Type: text/plain\r\nContent-Length: %s\r\nConnection: close\r\n\r\n' \
        "$1" "$(stat -c %s "$PROBE_STATE/reply.$$")"
    cat "$PROBE_STATE/reply.$$"
    rm -f "$PROBE_STATE/reply.$$"
}

refuse() { # the path that could not be used
    if [ -e "$1" ] || [ -e "$(dirname "$1")" ] && ! [ -r "$(dirname "$1")" ]; then
        printf EACCES | reply 403
    else
        printf ENOENT | reply 404
    fi
}

answer() {
    IFS=' ' read -r method target _ || return
    length=0
    while read -r header; do
        header=$(printf %s "$header" | tr -d '\r' | tr A-Z a-z)
        [ -z "$header" ] && break
        case $header in content-length:*) length=${header#*:} length=${length# } ;; esac
    done
    path=${target%%\?*} query=
    [ "$path" = "$target" ] || query=${target#*\?}
    body="$PROBE_STATE/body.$$"
    head -c "$length" >"$body"
    "$(printf %s "$method" | tr A-Z a-z)"
    rm -f "$body"
}

get() {
    what=$(argument path)
    case $path in
    /) echo probe | reply 200 ;;
    /id)
        {
            echo "uid=$(id -u)"
            echo "gid=$(id -g)"
            echo "groups=$(id -G | tr ' ' ',')"
            echo "pid=$PROBE_MAIN"
            echo "start=$(cat "$PROBE_STATE/start")"
            echo "host=$(hostname)"
            echo "cwd=$(readlink "/proc/$PROBE_MAIN/cwd")"
            echo "umask=$(sed -n 's/^Umask:[[:space:]]*//p' "/proc/$PROBE_MAIN/status")"
        } | reply 200
        ;;
    /env) reply 200 <"/proc/$PROBE_MAIN/environ" ;;
    /argv) reply 200 <"/proc/$PROBE_MAIN/cmdline" ;;
    /stdin)
        {
            if [ -e "$PROBE_STATE/stdin.end" ]; then echo end; else echo open; fi
            cat "$PROBE_STATE/stdin"
        } | reply 200
        ;;
    /read) if [ -f "$what" ] && cat "$what" >/dev/null 2>&1; then reply 200 <"$what"; else refuse "$what"; fi ;;
    /list) if ls "$what" >/dev/null 2>&1; then ls -A "$what" | reply 200; else refuse "$what"; fi ;;
    /stat) if stat "$what" >/dev/null 2>&1; then stat -c '%u %g %a %s' "$what" | reply 200; else refuse "$what"; fi ;;
    /connect) dial "$(argument to)" ;;
    /count) reply 200 <"$PROBE_STATE/count" ;;
    *) printf ENOENT | reply 404 ;;
    esac
}

dial() {
    case $1 in
    tcp:*)
        host=${1#tcp:} port=${1##*:}
        host=${host%:*}
        if nc -w 2 "$host" "$port" -e /bin/true 2>/dev/null; then
            echo connected | reply 200
        else
            printf ECONNREFUSED | reply 403
        fi
        ;;
    *) # busybox has no client for Unix sockets: what cannot even be seen cannot be connected to
        if [ -S "${1#unix:}" ] && [ -w "${1#unix:}" ]; then echo connected | reply 200; else refuse "${1#unix:}"; fi
        ;;
    esac
}

post() {
    what=$(argument path)
    case $path in
    /count)
        while ! mkdir "$PROBE_STATE/lock" 2>/dev/null; do :; done
        echo $(($(cat "$PROBE_STATE/count") + 1)) >"$PROBE_STATE/count.new"
        mv "$PROBE_STATE/count.new" "$PROBE_STATE/count"
        rmdir "$PROBE_STATE/lock"
        reply 200 <"$PROBE_STATE/count"
        return
        ;;
    /write)
        if ! cat "$body" 2>/dev/null >"$what"; then
            if [ -w "$what" ]; then printf ENOSPC | reply 403; else refuse "$what"; fi
            return
        fi
        ;;
    /log)
        n=$(argument repeat)
        { cat "$body" && echo; } >"$body.line"
        if [ "${n:-1}" -eq 1 ]; then
            cat "$body.line" >"/proc/$PROBE_MAIN/fd/1"
        else # awk, as a process for each line would take minutes; it knows no NUL
            awk -v n="$n" -v f="$body.line" 'BEGIN {
                RS = "\001"; getline text < f; for (i = 0; i < n; i++) printf "%s", text }' >"/proc/$PROBE_MAIN/fd/1"
        fi
        rm -f "$body.line"
        ;;
    /memory)
        bytes=$(argument bytes)
        (
            ballast=$(head -c "$bytes" /dev/zero | tr '\0' x)
            : >"$body.held"
            while sleep 60; do : "$ballast"; done
        ) </dev/null >/dev/null 2>&1 &
        holder=$!
        echo "$holder" >>"$PROBE_STATE/holders"
        while [ ! -e "$body.held" ]; do
            if ! kill -0 "$holder" 2>/dev/null; then
                printf ENOMEM | reply 403
                return
            fi
            usleep 50000
        done
        rm -f "$body.held"
        ;;
    /fork)
        : >"$body.pids"
        n=$(argument count)
        # ash ends when it cannot fork: that is left to a shell of its own, and nothing is forked before all are gone.
        (
            while [ "$n" -gt 0 ]; do
                n=$((n - 1))
                sleep 60 &
                echo "$!" >>"$body.pids"
            done
        ) </dev/null >/dev/null 2>&1
        n=0
        while read -r pid; do
            kill -9 "$pid" 2>/dev/null
            n=$((n + 1))
        done <"$body.pids"
        usleep 100000
        rm -f "$body.pids"
        echo "$n" | reply 200
        return
        ;;
    /burn) timeout "$(argument seconds)" sh -c 'while :; do :; done' ;;
    /heartbeat)
        setsid sh -c 'trap "" TERM HUP INT; while :; do cat /proc/uptime >"$1"; usleep 100000; done' - "$what" \
            </dev/null >/dev/null 2>&1 &
        ;;
    /exit)
        argument code >"$PROBE_STATE/exit"
        (usleep 200000; kill -USR1 "$PROBE_MAIN") </dev/null >/dev/null 2>&1 &
        ;;
    *)
        printf ENOENT | reply 404
        return
        ;;
    esac
    echo "done" | reply 200
}

case $1 in
--answer) answer ;;
*) main "$1" ;;
esac
