#!/bin/sh
# Cargo calls this in place of rustc (.cargo/config.toml). It has our own crates instrumented, so that libFuzzer sees which of
# their branches an input reaches. The crates below them stay as the tests built them: libFuzzer reads the counters of all
# branches after each execution, and ours are what is fuzzed. Generic parsers (serde, prost) are compiled into ours.
# The flags are those of `cargo fuzz build --sanitizer none`; the stable compiler has them.
coverage="-Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares"
case " $* " in
    # Without quotes, to make it several arguments.
    *" --crate-name midemb "* | *" --crate-name midemb_client "* | *" --crate-name midemb_fuzz "*) exec "$@" $coverage ;;
    *) exec "$@" ;;
esac
