#!/usr/bin/env bash
# Spark needs Java 17 or newer. Uses what is there; installs Debian's headless JRE when root; else says what to do.
set -u
major() { "$1" -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' | head -n 1; }
# JAVA_HOME wins over the path, as it does for Spark.
java=${JAVA_HOME:+$JAVA_HOME/bin/java}
java=${java:-$(command -v java 2>/dev/null)}
[ -n "$java" ] && [ -x "$java" ] && found=$(major "$java") && [ "${found:-0}" -ge 17 ] && exit 0
if [ -z "${JAVA_HOME:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing a Java runtime for Spark"
  apt-get update -qq >/dev/null && for package in openjdk-17-jre-headless openjdk-21-jre-headless default-jre-headless; do
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >/dev/null 2>&1 && exit 0
  done
fi
echo "Java 17 or newer is needed by Spark and was not found: install it (Debian: apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17) or set JAVA_HOME, then run again." >&2
exit 1
