//! `vdisk compact` on real files: what it gives back, that it may be killed, and what it leaves alone.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod support;

use support::sh;

/// `half IMAGE`: 96 MiB of data, of which every other 512 KiB are zeroes that take space. `len FILE`, `used FILE`: bytes, and bytes on the
/// host. `low A B`: fails unless B is at most 55 % of A. `unclean IMAGE`: whether it is marked as open.
const HELPERS: &str = r#"
trap 'echo "line $LINENO: $BASH_COMMAND"; cat out err 2>/dev/null' ERR
half() {
    qemu-img create -q -f vmdk "$1" 200M
    for n in $(seq 0 2 190); do
        printf 'write -q -P %d %dk 512k\nwrite -q -P 0 %dk 512k\n' $((n / 2 % 200 + 1)) $((n * 512)) $((n * 512 + 512))
    done | qemu-io -f vmdk "$1" >/dev/null
    # What qemu has left as a hole takes space as well.
    cp --sparse=never "$1" copy
    mv copy "$1"
}
len() { stat -c %s "$1"; }
used() { echo $(($(stat -c %b "$1") * 512)); }
low() { [ $(($2 * 100)) -le $(($1 * 55)) ]; }
unclean() { [ "$(od -A n -t u1 -j 72 -N 1 "$1")" -eq 1 ]; }
compact() { "$vdisk" compact "$@" >out 2>err && echo 0 || echo $?; }
"#;

fn script(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), &format!("{HELPERS}{text}"))
}

#[test]
fn half_an_image_is_given_back_as_it_was_said_beforehand() {
    script(
        r#"
        half d.vmdk
        cp --sparse=never d.vmdk before.vmdk
        sync d.vmdk
        was=$(used d.vmdk)
        [ "$(compact --dry-run --json d.vmdk)" = 0 ]
        cmp d.vmdk before.vmdk
        [ "$(used d.vmdk)" = "$was" ]
        field() { sed -n "s/^ *\"$1\": \([0-9]*\),*$/\1/p" out; }
        will_len=$(field bytes_after) will_use=$(field host_bytes_after)
        [ "$(compact d.vmdk)" = 0 ]
        grep -q '^768 grains of zeroes dropped, [0-9]* grains moved$' out
        low "$(len before.vmdk)" "$(len d.vmdk)"
        low "$(used before.vmdk)" "$(used d.vmdk)"
        [ "$will_len" = "$(len d.vmdk)" ]
        # To 1 %: the host has blocks of its own for a file.
        [ $((($(used d.vmdk) - will_use) * 100)) -le "$will_use" ]
        [ $(((will_use - $(used d.vmdk)) * 100)) -le "$will_use" ]
        qemu-img compare -q d.vmdk before.vmdk
        qemu-img check -q d.vmdk
        "$vdisk" check d.vmdk | grep -q '^no errors found$'
        cp --sparse=never d.vmdk once.vmdk
        [ "$(compact d.vmdk)" = 0 ]
        grep -q '^0 grains of zeroes dropped, 0 grains moved$' out
        cmp d.vmdk once.vmdk
        "#,
    );
}

#[test]
fn what_was_discarded_is_cut_off() {
    script(
        r#"
        half d.vmdk
        discard() {
            for n in $(seq 0 2 94); do echo "discard -q $((n * 1024))k 1M"; done | qemu-io -f raw "$uri" >/dev/null
        }
        serving d.vmdk discard
        cp d.vmdk before.vmdk
        [ "$(compact d.vmdk)" = 0 ]
        low "$(len before.vmdk)" "$(len d.vmdk)"
        qemu-img compare -q d.vmdk before.vmdk
        "$vdisk" check d.vmdk | grep -q '^no errors found$'
        "#,
    );
}

#[test]
fn it_is_killed_twenty_times_and_goes_on_each_time() {
    script(
        r#"
        half before.vmdk
        cp before.vmdk d.vmdk
        begun=$(date +%s%N)
        [ "$(compact d.vmdk)" = 0 ]
        all=$((($(date +%s%N) - begun) / 1000000))
        whole=$(len d.vmdk)
        kills=0 inside=0
        while [ $kills -lt 20 ]; do
            cp before.vmdk d.vmdk
            # Each run goes on with what the one before has left, until one gets through.
            while [ $kills -lt 20 ]; do
                after=$((1 + RANDOM * (all + 1) / 32768 / 3))
                status=0
                timeout --foreground --signal KILL "$(printf '%d.%03d' $((after / 1000)) $((after % 1000)))" "$vdisk" compact d.vmdk >out 2>err || status=$?
                # 124: the time was up, and it had got through all the same.
                if [ $status = 0 ] || [ $status = 124 ]; then
                    [ ! -s err ]
                    if unclean d.vmdk; then false; fi
                    break
                fi
                [ $status = 137 ]
                kills=$((kills + 1))
                ! unclean d.vmdk || inside=$((inside + 1))
                qemu-img compare -q d.vmdk before.vmdk
                "$vdisk" check --json d.vmdk >found || true
                [ -z "$(grep '"kind"' found | grep -v '"unclean"\|"copies_differ"')" ]
            done
        done
        echo "$inside of $kills while it was at work" >&2
        [ $inside -gt 0 ]
        [ "$(compact d.vmdk)" = 0 ]
        [ "$(len d.vmdk)" = "$whole" ]
        qemu-img compare -q d.vmdk before.vmdk
        "$vdisk" check d.vmdk | grep -q '^no errors found$'
        "#,
    );
}

#[test]
fn an_interrupt_ends_it_with_the_image_closed() {
    script(
        r#"
        half before.vmdk
        for attempt in $(seq 50); do
            cp before.vmdk d.vmdk
            "$vdisk" compact d.vmdk >out 2>err & process=$!
            until unclean d.vmdk || ! kill -0 $process 2>/dev/null; do :; done
            kill -INT $process 2>/dev/null || true
            status=0
            wait $process || status=$?
            # It may have been faster.
            [ $status = 0 ] || break
        done
        [ $status = 1 ]
        grep -q 'compact d.vmdk: ended early: the image is whole and closed (the next vdisk compact goes on)' err
        ! unclean d.vmdk
        "$vdisk" check d.vmdk | grep -q '^no errors found$'
        qemu-img compare -q d.vmdk before.vmdk
        [ "$(compact d.vmdk)" = 0 ]
        low "$(len before.vmdk)" "$(len d.vmdk)"
        qemu-img compare -q d.vmdk before.vmdk
        "#,
    );
}

#[test]
fn raw_and_flat_images_get_holes_and_keep_their_length() {
    script(
        r#"
        for n in $(seq 40); do head -c 512k /dev/urandom; head -c 512k /dev/zero; done >d.img
        cp --sparse=never d.img before.img
        [ "$(compact d.img)" = 0 ]
        cmp d.img before.img
        low "$(used before.img)" "$(used d.img)"
        qemu-img convert -O vmdk -o subformat=monolithicFlat before.img f.vmdk
        cp --sparse=never f-flat.vmdk before.img
        cp --sparse=never before.img f-flat.vmdk
        cp f.vmdk descriptor
        [ "$(compact f.vmdk)" = 0 ]
        cmp f-flat.vmdk before.img
        cmp f.vmdk descriptor
        low "$(used before.img)" "$(used f-flat.vmdk)"
        "#,
    );
}

#[test]
fn children_are_compacted_and_parents_are_not_touched_and_still_fit() {
    script(
        r#"
        half base.vmdk
        qemu-img create -q -f vmdk -b base.vmdk -F vmdk d.vmdk
        # Over data of the parent, over zeroes of it, and over nothing.
        qemu-io -f vmdk -c 'write -q -P 0 0 512k' -c 'write -q -P 0 512k 512k' -c 'write -q -P 0 150M 1M' -c 'write -q -P 5 160M 1M' d.vmdk
        cp base.vmdk base.before
        cp d.vmdk d.before.vmdk
        [ "$(compact d.vmdk)" = 0 ]
        # Zeroes that hide something stay.
        grep -q '^24 grains of zeroes dropped' out
        cmp base.vmdk base.before
        qemu-img compare -q d.vmdk d.before.vmdk
        # The parent of a child that does not know of it.
        [ "$(compact base.vmdk)" = 0 ]
        low "$(len base.before)" "$(len base.vmdk)"
        qemu-img compare -q d.vmdk d.before.vmdk
        "$vdisk" check d.vmdk | grep -q '^no errors found$'
        "#,
    );
}

#[test]
fn what_cannot_be_compacted_is_said_and_left_as_it_is() {
    script(
        r#"
        export XDG_RUNTIME_DIR=$PWD/run
        mkdir run
        qemu-img create -q -f vmdk d.vmdk 64M
        qemu-io -f vmdk -c 'write -q -P 3 0 1M' d.vmdk
        not_now() { [ "$(compact d.vmdk)" = 1 ]; grep -q 'end the other process' err; }
        serving d.vmdk not_now
        qemu-img convert -O vmdk -o subformat=streamOptimized d.vmdk s.vmdk
        [ "$(compact s.vmdk)" = 1 ]
        grep -q 'compact s.vmdk: ' err
        "$vdisk" serve d.vmdk --socket sock 2>serve.log & server=$!
        until [ -S sock ]; do kill -0 $server; sleep 0.01; done
        head -c 3M /dev/urandom >data
        truncate -s 64M data
        nbdcopy data 'nbd+unix:///?socket=sock'
        kill -KILL $server
        wait $server || true
        cp d.vmdk before.vmdk
        [ "$(compact d.vmdk)" = 1 ]
        grep -q 'run vdisk recover' err
        cmp d.vmdk before.vmdk
        "$vdisk" recover d.vmdk >/dev/null
        [ "$(compact d.vmdk)" = 0 ]
        qemu-img compare -q -f raw -F vmdk data d.vmdk
        # An entry past the end.
        printf '\377\377\377\177' | dd of=d.vmdk bs=1 seek=$(($(od -A n -t u4 -j $(($(od -A n -t u4 -j 56 -N 4 d.vmdk) * 512)) -N 4 d.vmdk) * 512)) \
            conv=notrunc status=none
        cp d.vmdk before.vmdk
        [ "$(compact d.vmdk)" = 1 ]
        grep -q 'something is wrong with it (vdisk check shows all, and may repair it)' err
        cmp d.vmdk before.vmdk
        "#,
    );
}
