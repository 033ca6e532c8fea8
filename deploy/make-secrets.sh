#!/bin/sh
# Generates the secrets of a deployment once, in folders that are mounted only by the containers that need them:
#
#   $1/postgres/password                                             for PostgreSQL
#   $1/redis/password, redis.conf                                    for Redis
#   $1/server/api_key, worker_secret, database_url, redis_url        for the server and the migrations
#   $1/worker/worker_secret, redis_url                               for workers: no database, no API key
#
# Existing files are kept, so running the script again changes nothing. In the first run, ZETA_API_KEY, if set, becomes
# the admin key. Each file is written under a temporary name and renamed, so an interrupted run leaves no partial secret.
set -eu
umask 022 # the containers run as different users, and each mounts only its own folder
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
