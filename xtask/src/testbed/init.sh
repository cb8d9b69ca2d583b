#!/bin/sh
# The testbed's first process. It mounts what Linux programs expect, runs /etc/command and reports
# its exit status through the second virtio port; the first one carries its output.
# The tests are told that nothing is as fast here as it is said to be.
export PATH=/bin:/sbin HOME=/root BLACKOUT_EMULATED=1
/bin/busybox mkdir -p /proc /sys /dev /tmp /root /run /share /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /dev/shm
mount -t tmpfs tmp /tmp
mount -t tracefs trace /sys/kernel/tracing
mount -t debugfs debug /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
ip link set lo up
hostname testbed
ln -sf /proc/self/fd /dev/fd

for module in $(cat /etc/modules); do
    insmod "/modules/$module.ko" || echo "testbed: module $module does not load" > /dev/console
done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share /share ||
    echo "testbed: the share is not there" > /dev/console
# Programs of a distribution, where it has been given any; they look for their libraries in /lib.
if grep -q usr /sys/bus/virtio/devices/*/mount_tag; then
    mkdir -p /usr
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose usr /usr &&
        ln -s usr/lib /lib &&
        export PATH=$PATH:/usr/bin
    # What busybox calls tc knows little of what shapes a network.
    [ -e /usr/sbin/tc ] && ln -sf /usr/sbin/tc /bin/tc
fi

# The machine outside takes a testbed whose heart stands still for hung.
if [ -e /etc/heartbeat ]; then
    while :; do
        echo
        sleep 5
    done < /dev/null > /dev/vport0p3 2>&1 &
fi

cd /root
if [ -e /etc/interactive ]; then
    echo "Linux $(uname -rm) with KVM. Shared folder: /share. 'exit' powers off." \
        > /dev/hvc0
    setsid -c sh -c '. /etc/command' < /dev/hvc0 > /dev/hvc0 2>&1
else
    sh /etc/command < /dev/null > /dev/vport0p1 2>&1
fi
status=$?
sync
echo $status > /dev/vport0p2
poweroff -f
