//! A server is killed: what it had acknowledged is taken over, by whom it may be, and said where it cannot be.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod support;

use support::sh;

/// `killed IMAGE OPTIONS...`: serves the image, writes 3 MiB of noise to `data` and to the disk without a flush, kills the server.
const KILLED: &str = r#"
export XDG_RUNTIME_DIR=$PWD/run
mkdir -p run
killed() {
    local server
    "$vdisk" serve "$@" --socket sock 2>serve.log &
    server=$!
    until [ -S sock ]; do kill -0 $server || { cat serve.log; return 1; }; sleep 0.01; done
    head -c 3M /dev/urandom > data
    truncate -s 64M data
    nbdcopy data "nbd+unix:///?socket=sock"
    kill -KILL $server
    wait $server 2>/dev/null || true
    rm sock
}
"#;

fn script(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), &format!("{KILLED}{text}"))
}

#[test]
fn recover_puts_what_was_not_flushed_into_the_image_and_closes_it() {
    script(
        r#"
        qemu-img create -q -f vmdk d.vmdk 64M
        killed d.vmdk
        "$vdisk" info d.vmdk 2>&1 | grep -q 'a killed server has left 48 grains'
        if "$vdisk" check d.vmdk >/dev/null 2>notice; then false; fi
        grep -q 'run vdisk recover' notice
        [ "$("$vdisk" recover d.vmdk)" = 'took over 48 grains that a killed server had not flushed' ]
        [ "$("$vdisk" recover d.vmdk)" = 'nothing to recover: the image was closed' ]
        "$vdisk" check d.vmdk | grep -q 'no errors found'
        qemu-img check -q d.vmdk
        qemu-img compare -q -f raw -F vmdk data d.vmdk
        "#,
    );
}

#[test]
fn the_next_serve_takes_over_and_a_living_server_leaves_nothing() {
    script(
        r#"
        qemu-img create -q -f vmdk d.vmdk 64M
        killed d.vmdk
        look() { nbdcopy "$uri" seen; cmp data seen; nbdcopy data "$uri"; [ -z "$("$vdisk" info d.vmdk 2>&1 >/dev/null)" ]; }
        serving d.vmdk look
        grep -q 'took over 48 grains' serve.log
        qemu-img compare -q -f raw -F vmdk data d.vmdk
        "#,
    );
}

#[test]
fn an_overlay_of_a_raw_image_is_recovered_with_its_base() {
    script(
        r#"
        truncate -s 64M base.raw
        killed --format raw --overlay over.vmdk base.raw
        if "$vdisk" recover over.vmdk 2>why; then false; fi
        # A wrong name is not made.
        if "$vdisk" recover --overlay other.vmdk base.raw 2>why; then false; fi
        grep -q 'overlay other.vmdk: No such file' why
        [ ! -e other.vmdk ]
        "$vdisk" recover --overlay over.vmdk base.raw | grep -q 'took over'
        "$vdisk" info over.vmdk 2>&1 | grep -q 'has to be named: --overlay'
        "$vdisk" check over.vmdk 2>/dev/null | grep -q 'no errors found'
        "$vdisk" check --overlay over.vmdk base.raw | grep -q 'no errors found'
        "$vdisk" map --overlay over.vmdk base.raw | grep -q 'over.vmdk'
        if "$vdisk" map over.vmdk 2>why; then false; fi
        grep -q 'has to be named: --overlay' why
        serving_over() { nbdcopy "$uri" seen; cmp data seen; }
        options='--format raw --overlay over.vmdk' serving base.raw serving_over
        "#,
    );
}

#[test]
fn an_image_whose_parent_waits_for_its_recovery_is_not_served() {
    script(
        r#"
        qemu-img create -q -f vmdk base.vmdk 64M
        killed base.vmdk
        if "$vdisk" serve --overlay over.vmdk base.vmdk --socket s 2>why; then false; fi
        grep -q 'base.vmdk: was served by a process that was killed.*run vdisk recover on it' why
        rm over.vmdk
        "$vdisk" recover base.vmdk >/dev/null
        same() { nbdcopy "$uri" seen; cmp data seen; }
        options='--overlay over.vmdk' serving base.vmdk same
        "#,
    );
}

#[test]
fn what_does_not_fit_the_image_any_more_is_said_to_be_lost() {
    script(
        r#"
        qemu-img create -q -f vmdk d.vmdk 64M
        killed d.vmdk
        qemu-io -f vmdk -c 'write -P 7 30M 64k' d.vmdk >/dev/null
        "$vdisk" recover d.vmdk | grep -q 'is lost: the image was closed or changed by another program since'
        qemu-io -f vmdk -c 'read -P 0 0 3M' -c 'read -P 7 30M 64k' d.vmdk | grep -vq failed
        qemu-img check -q d.vmdk
        "#,
    );
}

/// As root, since the place is a mount.
#[test]
fn a_full_run_directory_costs_the_ledger_and_not_the_service() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: for root");
    }
    script(
        r#"
        qemu-img create -q -f vmdk d.vmdk 64M
        cp "$vdisk" program
        unshare --mount bash -euo pipefail -c '
            mount -t tmpfs -o size=64k none /run
            ./program serve d.vmdk --socket s 2>log & server=$!
            until [ -S s ]; do kill -0 $server; sleep 0.01; done
            kill $server; wait $server
            ls /run/vdisk/ledgers > left
        '
        grep -q 'what was not flushed is lost: .*No space left' log
        [ ! -s left ]
        "#,
    );
}
