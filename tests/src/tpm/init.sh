#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Process 1 of a guest that uses its TPM. Does what cvmm.do on the kernel command line lists, and says what it found in lines
# that begin with "cvmm-guest:", as l2-init does. Keys and counters of `keep` outlive the guest.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t securityfs security /sys/kernel/security
mount -t tmpfs tmp /tmp
export PATH=/usr/bin:/bin TPM2TOOLS_TCTI=device:/dev/tpmrm0
cd /tmp

say() { echo "cvmm-guest: $*"; }
# Runs a command; if it fails, its last words become an error.
try() { "$@" >out 2>&1 || say error "$*: $(tail -n 1 out)"; }
hex() { hexdump -v -e '1/1 "%02x"' "$1"; }

for n in $(seq 100); do test -e /dev/tpmrm0 && break; sleep 0.1; done
test -e /dev/tpmrm0 || say error 'no /dev/tpmrm0'
say log "$(dmesg | grep 'Memory Encryption Features active' | head -n 1)"

for action in $(sed -n 's/.*cvmm\.do=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' '); do
    case $action in
    log)
        say version "$(cat /sys/class/tpm/tpm0/tpm_version_major)"
        say eventlog "$(hex /sys/kernel/security/tpm0/binary_bios_measurements)"
        all=0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        try tpm2_pcrread sha256:$all+sha384:$all
        bank=
        while IFS=' :' read -r pcr value; do
            case $pcr in
            sha*) bank=$pcr ;;
            *) say pcr "$bank $pcr $value" ;;
            esac
        done <out
        ;;
    tools)
        mkdir -p tools && cd tools
        sh /tpm2.sh 2>&1 | while read -r line; do say step "$line"; done
        cd ..
        ;;
    ppi)
        cd /sys/class/tpm/tpm0/ppi
        say ppi-version "$(cat version)"
        say ppi-waits "$(cat request)"
        say ppi-done "$(cat response)"
        cd /tmp
        ;;
    ask)
        echo 5 >/sys/class/tpm/tpm0/ppi/request || say error 'the request was refused'
        say asked "$(cat /sys/class/tpm/tpm0/ppi/request)"
        ;;
    spoil)
        # What a guest extends must be gone after a reset.
        for pcr in 4 8 14; do try tpm2_pcrextend $pcr:sha256=$(printf %064d 1); done
        ;;
    keep)
        if ! tpm2_nvreadpublic 0x1500020 >out 2>&1; then
            say made-counter
            try tpm2_nvdefine -Q 0x1500020 -C o -a 'ownerread|ownerwrite|nt=counter'
        fi
        try tpm2_nvincrement -Q 0x1500020 -C o
        tpm2_nvread 0x1500020 -C o >counter 2>out || say error "nvread: $(tail -n 1 out)"
        say counter "$(hex counter)"
        if ! tpm2_readpublic -Q -c 0x81010060 -n name >out 2>&1; then
            say made-key
            try tpm2_createprimary -Q -C o -g sha256 -G ecc -c primary.ctx
            try tpm2_evictcontrol -Q -C o -c primary.ctx 0x81010060
            tpm2_flushcontext -t >out 2>&1
            try tpm2_readpublic -Q -c 0x81010060 -n name
        fi
        say key "$(hex name)"
        ;;
    clock)
        # What the clock shows; then it is set ten years ahead of that.
        test -e /dev/rtc0 || say error 'no /dev/rtc0'
        try hwclock -s -u
        now=$(date -u +%s)
        say clock "$now"
        date -u -s "@$((now + 315360000))" >out 2>&1 || say error "date: $(tail -n 1 out)"
        try hwclock -w -u
        ;;
    lose)
        say waiting
        # Until whoever watches the console has ended the service; a TPM that works now is an error.
        for n in $(seq 300); do
            sleep 0.2
            timeout 60 tpm2_getrandom --hex 8 >out 2>&1 || break
        done
        if timeout 60 tpm2_getrandom --hex 8 >out 2>&1; then say error 'the TPM still works'; else say tpm-failed; fi
        ;;
    reboot) reboot -f ;;
    poweroff) poweroff -f ;;
    *) say error "no action $action" ;;
    esac
done
poweroff -f
