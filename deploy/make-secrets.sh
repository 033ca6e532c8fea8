#!/bin/sh
# Makes the secrets of a deployment once, and lays each where only the containers that need it can read it:
#
#   $1/postgres/password                                             PostgreSQL's own
#   $1/redis/password, redis.conf                                    Redis's own
#   $1/server/api_key, worker_secret, database_url, redis_url        the server's and the migrations'
#   $1/worker/worker_secret, redis_url                               a worker's: no database, no API key
#
# What is there already stays as it is, so running it again changes nothing. ZETA_API_KEY, where set, becomes the admin
# key of the first run. Each file is made under another name and renamed, so a killed run leaves no half secret.
set -eu
umask 022 # each folder is mounted in its own containers only, whose users differ
root=$1

random() { # 64 hexadecimal digits, safe in a URL
    LC_ALL=C tr -dc 'a-f0-9' </dev/urandom | head -c 64
}

keep_or_write() { # FILE CONTENT
    if [ ! -s "$1" ]; then
        printf '%s\n' "$2" >"$1.new"
        mv "$1.new" "$1"
    fi
}

for folder in postgres redis server worker; do mkdir -p "$root/$folder"; done

keep_or_write "$root/postgres/password" "$(random)"
keep_or_write "$root/redis/password" "$(random)"
keep_or_write "$root/server/api_key" "${ZETA_API_KEY:-zeta_$(random)}"
keep_or_write "$root/server/worker_secret" "$(random)"

keep_or_write "$root/redis/redis.conf" "requirepass $(cat "$root/redis/password")"
keep_or_write "$root/server/redis_url" "redis://:$(cat "$root/redis/password")@redis:6379/0"
keep_or_write "$root/server/database_url" "postgresql://zeta:$(cat "$root/postgres/password")@postgres:5432/zeta"
keep_or_write "$root/worker/redis_url" "$(cat "$root/server/redis_url")"
keep_or_write "$root/worker/worker_secret" "$(cat "$root/server/worker_secret")"
