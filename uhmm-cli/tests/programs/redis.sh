#!/bin/sh
# Starts a redis-server by "$@" in the folder $FOLDER with $KEYS keys, has it benchmarked and saved in
# the background, and says what is in it before, and what a second server has read from the file.
set -eu
ask() { redis-cli -s "$FOLDER/socket" "$@"; }
serve() {
    "$@" redis-server --port 0 --unixsocket "$FOLDER/socket" --save "" --dir "$FOLDER" \
        --enable-debug-command yes --logfile "$FOLDER/log" &
    server=$!
    tries=0
    until ask ping > "$FOLDER/pong" 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || { echo "the server does not answer"; exit 9; }
        sleep 0.1
    done
}
serve "$@"
ask debug populate "$KEYS" key 200
redis-benchmark -s "$FOLDER/socket" -q -n "$((KEYS / 4))" -r "$KEYS" -d 100 -t set,get,incr > "$FOLDER/benchmark" 2>&1
ask eval 'for i = 1, ARGV[1] do redis.call("set", "mine" .. i, string.rep(i, 20)) end' 0 "$((KEYS / 4))"
ask del key:__rand_int__ counter:__rand_int__ mylist > "$FOLDER/deleted"
before=$(ask debug digest)
ask bgsave
tries=0
until ask info persistence | grep -q "rdb_bgsave_in_progress:0"; do
    tries=$((tries + 1))
    [ "$tries" -lt 600 ] || { echo "it does not end"; exit 9; }
    sleep 0.1
done
ask info persistence | tr -d '\r' | grep "rdb_last_bgsave_status"
ask shutdown nosave
wait "$server" && echo "status 0" || echo "status $?"
# What was saved, read by a server that is left alone.
serve env
after=$(ask debug digest)
ask shutdown nosave
wait "$server"
[ "$before" = "$after" ] && echo "what was saved is what was there" || echo "$before is not $after"
