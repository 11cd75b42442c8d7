//! `vdisk check --repair` on images that qemu has written and something has damaged.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod support;

use support::sh;

/// `put FILE BYTE 'TEXT'`: changes bytes as printf has them. `word FILE BYTE`: a number of 4 bytes. `table FILE`, `copy FILE`: where the
/// first grain table and its copy are. `check ARGUMENTS...`: prints the exit status, and leaves `out` and `err`.
const HELPERS: &str = r#"
trap 'echo "line $LINENO: $BASH_COMMAND"; cat out err 2>/dev/null' ERR
put() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }
word() { od -A n -t u4 -j "$2" -N 4 "$1" | tr -d ' '; }
table() { echo $(($(word "$1" $(($(word "$1" 56) * 512))) * 512)); }
copy() { echo $(($(word "$1" $(($(word "$1" 48) * 512))) * 512)); }
check() { "$vdisk" check "$@" >out 2>err && echo 0 || echo $?; }
make() {
    qemu-img create -q -f vmdk -o "$2" "$1" 200M
    qemu-io -f vmdk -c 'write -P 7 100k 300k' -c 'write -P 9 150M 1M' "$1" >/dev/null
}
"#;

fn script(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), &format!("{HELPERS}{text}"))
}

#[test]
fn a_damaged_image_is_as_it_was_before_the_damage_and_undone_as_it_was_before_the_repair() {
    script(
        r#"
        make d.vmdk subformat=monolithicSparse
        cp d.vmdk whole.vmdk
        # A sector of the first table is zeroed, an entry of its copy is garbage, nobody closed it, and there is more behind the end.
        dd if=/dev/zero of=d.vmdk bs=512 seek=$(($(table d.vmdk) / 512)) count=1 conv=notrunc status=none
        put d.vmdk 72 '\1'
        head -c 100000 /dev/urandom >>d.vmdk
        cp d.vmdk damaged.vmdk
        [ "$(check d.vmdk)" = 1 ]
        cmp d.vmdk damaged.vmdk
        [ "$(check --repair d.vmdk)" = 0 ]
        grep -q '^d.vmdk: byte [0-9]*: 6 entries of grain table 0 were taken from its redundant copy (repaired)$' out
        grep -q '^d.vmdk: 100000 bytes that nothing names were given back (repaired)$' out
        grep -q '^d.vmdk: byte 72: was marked as closed (uncleanShutdown) (repaired)$' out
        grep -q 'vdisk check --undo d.vmdk.repair-1 d.vmdk puts it back$' out
        grep -q '^no errors found$' out
        cmp d.vmdk whole.vmdk
        [ "$(stat -c %a d.vmdk.repair-1)" = 600 ]
        # Nothing is left to do, and nothing to keep.
        [ "$(check --repair d.vmdk)" = 0 ]
        [ "$(cat out)" = 'no errors found' ]
        [ ! -e d.vmdk.repair-2 ]
        [ "$(check --undo d.vmdk.repair-1 d.vmdk)" = 0 ]
        cmp d.vmdk damaged.vmdk
        # From another directory, to another name, and what is counted.
        mkdir away
        (cd away && [ "$(check --repair --json --backup kept ../d.vmdk)" = 0 ])
        grep -q '"repaired": 3' away/out
        grep -q '"backup": "kept"' away/out
        cmp d.vmdk whole.vmdk
        (cd away && [ "$(check --undo kept ../d.vmdk)" = 0 ])
        cmp d.vmdk damaged.vmdk
        "#,
    );
}

#[test]
fn a_backup_is_put_back_with_dd_as_it_is_described() {
    script(
        r#"
        make d.vmdk subformat=monolithicSparse
        put d.vmdk $(($(copy d.vmdk) + 8)) '\377\377\377\177'
        cp d.vmdk damaged.vmdk
        [ "$(check --repair d.vmdk)" = 0 ]
        ! cmp -s d.vmdk damaged.vmdk
        record=$(grep -a '^{' d.vmdk.repair-1)
        field() { echo "$record" | sed "s/.*\"$1\":\([0-9]*\).*/\1/"; }
        dd conv=notrunc bs=512 if=d.vmdk.repair-1 of=d.vmdk status=none \
            skip=$(($(field at) / 512)) seek=$(($(field offset) / 512)) count=$(($(field len) / 512))
        cmp d.vmdk damaged.vmdk
        "#,
    );
}

#[test]
fn extents_of_a_split_image_are_repaired_and_what_is_not_sure_is_left_alone() {
    script(
        r#"
        qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse d.vmdk 3G
        qemu-io -f vmdk -c 'write -P 7 100k 300k' -c 'write -P 9 2500M 1M' d.vmdk >/dev/null
        mkdir whole
        cp d.vmdk d-s00* whole
        put d-s001.vmdk $(($(table d-s001.vmdk) + 8)) '\0\0\0\0'
        put d-s001.vmdk $(($(copy d-s001.vmdk) + 12)) '\0\0\0\0'
        put d-s002.vmdk 72 '\1'
        [ "$(check --repair d.vmdk)" = 1 ]
        grep -q '/d-s001.vmdk: grain table 0: 2 entries differ from its copy, and which are right cannot be told (left alone)$' out
        grep -q '/d-s002.vmdk: byte 72: was marked as closed (uncleanShutdown) (repaired)$' out
        [ "$(cat err)" = 'vdisk: check d.vmdk: 1 error left' ]
        cmp d-s002.vmdk whole/d-s002.vmdk
        # Of an image that was not closed, an entry that is there is not given up.
        put d-s001.vmdk 72 '\1'
        [ "$(check --repair d.vmdk)" = 0 ]
        cmp d-s001.vmdk whole/d-s001.vmdk
        qemu-img compare -q d.vmdk whole/d.vmdk
        mkdir moved
        mv d.vmdk d-s00* moved
        [ "$(check --undo d.vmdk.repair-2 moved/d.vmdk)" = 0 ]
        [ "$(check --undo d.vmdk.repair-1 moved/d.vmdk)" = 0 ]
        [ "$(check moved/d.vmdk)" = 1 ]
        cmp -s moved/d-s001.vmdk whole/d-s001.vmdk && exit 1
        [ "$(od -A n -t u1 -j 72 -N 1 moved/d-s002.vmdk)" -eq 1 ]
        "#,
    );
}

#[test]
fn a_parent_is_never_changed() {
    script(
        r#"
        make base.vmdk subformat=monolithicSparse
        qemu-img create -q -f vmdk -b base.vmdk -F vmdk d.vmdk
        qemu-io -f vmdk -c 'write -P 3 10M 1M' d.vmdk >/dev/null
        put base.vmdk 72 '\1'
        put d.vmdk 72 '\1'
        cp base.vmdk before.vmdk
        [ "$(check --repair d.vmdk)" = 1 ]
        grep -q '/base.vmdk: byte 72: .*(unclean)$' out
        cmp base.vmdk before.vmdk
        [ "$(check --repair base.vmdk)" = 0 ]
        [ "$(check d.vmdk)" = 0 ]
        "#,
    );
}

#[test]
fn formats_that_are_only_read_are_checked_and_said_to_be_so() {
    script(
        r#"
        make d.vmdk subformat=monolithicSparse
        qemu-img convert -O vmdk -o subformat=streamOptimized d.vmdk s.vmdk
        cp s.vmdk before.vmdk
        [ "$(check --repair s.vmdk)" = 0 ]
        size=$(stat -c %s s.vmdk)
        at=$(LC_ALL=C grep -obUaP '\x78[\x01\x5e\x9c\xda]' s.vmdk | head -1 | cut -d: -f1)
        put s.vmdk $((at + 20)) 'ZZZZZZZZ'
        [ "$(check --repair s.vmdk)" = 1 ]
        grep -q 'found, and it cannot be repaired: .*streamOptimized' err
        put s.vmdk 73 '\r\n'
        [ "$(check --repair s.vmdk)" = 1 ]
        grep -q '(newline_bytes)$' out
        truncate -s 1M raw.img
        [ "$(check --repair raw.img)" = 0 ]
        [ "$(cat out)" = 'a raw image: there is nothing to check' ]
        [ -z "$(ls *.repair-* 2>/dev/null)" ]
        "#,
    );
}

#[test]
fn an_image_in_use_or_with_a_ledger_is_not_repaired() {
    script(
        r#"
        export XDG_RUNTIME_DIR=$PWD/run
        mkdir run
        make d.vmdk subformat=monolithicSparse
        not_now() { [ "$(check --repair d.vmdk)" = 1 ]; grep -q 'end the other process' err; }
        serving d.vmdk not_now
        "$vdisk" serve d.vmdk --socket sock 2>serve.log & server=$!
        until [ -S sock ]; do kill -0 $server; sleep 0.01; done
        head -c 3M /dev/urandom >data
        truncate -s 200M data
        nbdcopy data 'nbd+unix:///?socket=sock'
        kill -KILL $server
        wait $server || true
        cp d.vmdk before.vmdk
        [ "$(check --repair d.vmdk)" = 1 ]
        grep -q 'run vdisk recover' err
        cmp d.vmdk before.vmdk
        "$vdisk" recover d.vmdk >/dev/null
        [ "$(check --repair d.vmdk)" = 0 ]
        qemu-img compare -q -f raw -F vmdk data d.vmdk
        "#,
    );
}

#[test]
fn a_backup_is_never_written_over_and_undoes_only_what_it_belongs_to() {
    script(
        r#"
        make d.vmdk subformat=monolithicSparse
        put d.vmdk 72 '\1'
        cp d.vmdk damaged.vmdk
        echo mine >d.vmdk.repair-1
        [ "$(check --repair --backup d.vmdk.repair-1 d.vmdk)" = 1 ]
        grep -q 'keep what is about to change: d.vmdk.repair-1: File exists (--backup names another file' err
        cmp d.vmdk damaged.vmdk
        [ "$(check --repair d.vmdk)" = 0 ]
        grep -q 'kept in d.vmdk.repair-2' out
        [ "$(cat d.vmdk.repair-1)" = mine ]
        [ "$(check --undo d.vmdk.repair-1 d.vmdk)" = 1 ]
        grep -q 'is no backup of a repair' err
        # Of another image, and of this one after somebody has changed it.
        make other.vmdk subformat=monolithicSparse
        [ "$(check --undo d.vmdk.repair-2 other.vmdk)" = 1 ]
        grep -q 'is of another image' err
        put d.vmdk 72 '\2'
        cp d.vmdk before.vmdk
        [ "$(check --undo d.vmdk.repair-2 d.vmdk)" = 1 ]
        grep -q 'was changed since the repair (nothing was put back)' err
        cmp d.vmdk before.vmdk
        put d.vmdk 72 '\1'
        [ "$(check --undo d.vmdk.repair-2 d.vmdk)" = 0 ]
        # What is not whole is about what was not changed.
        [ "$(check --repair --no-backup d.vmdk)" = 0 ]
        truncate -s -1 d.vmdk.repair-2
        [ "$(check --undo d.vmdk.repair-2 d.vmdk)" = 0 ]
        grep -q '^put back 0 bytes' out
        [ ! -e d.vmdk.repair-3 ]
        "#,
    );
}

/// As root, since the places are mounts.
/// The places that old entries name may be other grains' by now, whatever the repaired sectors hold.
#[test]
fn a_repair_of_an_image_that_was_written_since_is_not_undone() {
    script(
        r#"
        make d.vmdk subformat=monolithicSparse
        # An entry that the table lacks is in its copy, and names a place behind the end.
        put d.vmdk 72 '\1'
        put d.vmdk $(($(table d.vmdk) + 500 * 4)) '\0\0\1\0'
        [ "$(check --repair d.vmdk)" = 0 ]
        qemu-io -f vmdk -c 'write -P 3 4k 4k' d.vmdk >/dev/null
        cp d.vmdk written.vmdk
        [ "$(check --undo d.vmdk.repair-1 d.vmdk)" = 1 ]
        grep -q 'was written since the repair' err
        grep -q 'nothing was put back' err
        cmp d.vmdk written.vmdk
        [ "$(check d.vmdk)" = 0 ]
        "#,
    );
}

#[test]
fn a_full_or_read_only_place_is_said_before_anything_changes() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: for root");
    }
    script(
        r#"
        make d.vmdk subformat=monolithicSparse
        put d.vmdk 72 '\1'
        head -c 3M /dev/urandom >>d.vmdk
        cp d.vmdk damaged.vmdk
        mkdir full ro
        cp "$vdisk" program
        unshare --mount bash -euo pipefail -c '
            mount -t tmpfs -o size=64k none full
            ./program check --repair --backup full/kept d.vmdk >out 2>err && exit 1
            grep -q "No space left on device" err
            grep -q "nothing was changed" err
            [ -z "$(ls full)" ]
            cmp d.vmdk damaged.vmdk
            mount --bind . ro
            mount -o remount,ro,bind ro
            cd ro
            ../program check --repair d.vmdk >../out 2>../err && exit 1
            grep -q "Read-only file system" ../err
        '
        cmp d.vmdk damaged.vmdk
        "#,
    );
}
