#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Boots a systemd of its own over a copy-on-write view of this machine's root, installs the unit files as they are, and follows
# their instructions. Nothing of the machine changes. As root: systemd-container.sh PROGRAM UNITS WORK, where WORK is an empty
# folder for the log; the last line of WORK/log is UNITS-WORK if all went well.
set -eu
if [ "${4-}" != inside ]; then
    exec unshare --mount --pid --uts --ipc --net --cgroup --fork --kill-child bash "$0" "$1" "$2" "$3" inside
fi
program=$1 units=$2 work=$3
mount --make-rprivate /
top=$work/top; mkdir -p "$top"; mount -t tmpfs tmpfs "$top"; mkdir "$top/upper" "$top/inner" "$top/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/inner" "$top/root"
root=$top/root
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/sys/fs/cgroup" && mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for d in run tmp dev; do mount -t tmpfs -o mode=0755 tmpfs "$root/$d"; done
chmod 1777 "$root/tmp"
for d in null zero full random urandom tty; do
    mknod -m 666 "$root/dev/$d" c $(stat -c '0x%t 0x%T' "/dev/$d")
done
mkdir "$root/dev/shm" "$root/dev/pts" "$root/dev/mqueue" "$root/dev/hugepages"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"; ln -s /proc/self/fd "$root/dev/fd"
: >"$root/etc/fstab"; echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
# What the units need, in the places that they name.
install -m 755 "$program" "$root/usr/bin/vtpm-svc"
install -m 644 "$units"/*.service "$units"/*.socket "$root/etc/systemd/system/"
install -D -m 644 "$units/cvmm.sysusers.conf" "$root/etc/sysusers.d/cvmm.conf"
rm -rf "$root/var/lib/cvmm" "$root/etc/cvmm"
mkdir -p "$root/out"; mount --bind "$work" "$root/out"
cat >"$root/etc/systemd/system/try.target" <<'X'
[Unit]
Requires=basic.target try.service
After=basic.target
AllowIsolate=yes
X
cat >"$root/etc/systemd/system/try.service" <<'X'
[Service]
Type=oneshot
ExecStart=/bin/bash /opt/try.sh
StandardOutput=file:/out/log
StandardError=file:/out/log
ExecStopPost=/bin/systemctl --no-block exit
X
cat >"$root/opt/probe.py" <<'X'
import socket, struct, sys
def to(name):
    s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect('/run/cvmm/%s/%s' % (sys.argv[1], name)); return s
def ask(s, message):
    s.sendall(bytes.fromhex(message)); return s.recv(64).hex()
c = to('tpm-ctrl'); assert ask(c, '0000000200000000') == '00000000', 'INIT'
t = to('tpm-data'); assert ask(t, '80010000000c000001440000') == '80010000000a00000000', 'TPM2_Startup'
assert ask(t, '80010000000c0000017b0008')[12:20] == '00000000', 'TPM2_GetRandom'
if sys.argv[2:]: assert ask(c, '00000003') == '00000000', 'SHUTDOWN'
X
cat >"$root/opt/try.sh" <<'X'
set -eux
as() { setpriv --reuid="$1" --regid="$1" --clear-groups "${@:2}"; }
is() { test "$(systemctl show -p "$2" --value "$1")" = "$3"; }
# As the head of vtpm-svc@.service says.
systemd-sysusers
install -d -m 0700 /etc/cvmm
for vm in web1 web2; do
    head -c 32 /dev/urandom | systemd-creds encrypt --name=vmgs-key - /etc/cvmm/$vm.cred
    systemctl start vtpm-image@$vm
    systemctl start vtpm-svc@$vm.socket
done
if systemctl start vtpm-image@web1; then exit 1; fi
if as cvmm ls /var/lib/cvmm; then exit 1; fi
# Two VMs, by the monitor's user, and by nobody else.
for vm in web1 web2; do as cvmm python3 /opt/probe.py $vm; done
if setpriv --reuid=65534 --regid=65534 --clear-groups python3 /opt/probe.py web1; then exit 1; fi
systemctl status --no-pager -l vtpm-svc@web1
journalctl --no-pager -u 'vtpm-svc@*' >/tmp/said
# This machine may not let a service lock memory; nothing else is missing.
if grep -v 'memory is not locked' /tmp/said | grep -E 'warning|error'; then exit 1; fi
# Ended by the manager, by a client, by a kill: it is there again, with its state.
systemctl stop vtpm-svc@web1.service; is vtpm-svc@web1 Result success
as cvmm python3 /opt/probe.py web1 end
for n in $(seq 50); do is vtpm-svc@web1 ActiveState inactive && break; sleep 0.1; done
is vtpm-svc@web1 ActiveState inactive; is vtpm-svc@web1 Result success
as cvmm python3 /opt/probe.py web1
kill -9 "$(systemctl show -p MainPID --value vtpm-svc@web2)"
as cvmm python3 /opt/probe.py web2
test "$(journalctl --no-pager -u 'vtpm-svc@*' | grep -c 'manufactured a new TPM')" = 2
systemctl stop 'vtpm-svc@*.socket' 'vtpm-svc@*.service'
test -z "$(find /run/cvmm -type s)"
set +x; echo UNITS-WORK
X
cd "$root"; mkdir old; pivot_root . old; umount -l /old
# As a manager that boots a machine would find it.
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=try.target \
    --log-target=kmsg --show-status=0
