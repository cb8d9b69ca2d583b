#!/bin/sh
# The first process of the tests' Linux guests: loads what drivers there are and gives the serial
# console a shell. It says "guest: ready" when a command can be typed.
export PATH=/bin:/sbin HOME=/root PS1=
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /root /run /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp

release=$(uname -r)
series=$(echo "$release" | cut -d . -f 1,2)
case $release in
*cloud*) modules=/modules/$series-cloud ;;
*) modules=/modules/$series-generic ;;
esac
for module in $(cat "$modules/list"); do
    insmod "$modules/$module.ko" 2> /dev/null || echo "guest: module $module does not load" > /dev/kmsg
done
ip link set lo up

# A disk with a whole system goes on from here.
root=$(sed -n 's/.*root=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ -n "$root" ]; then
    mount -t ext4 "$root" /mnt
    for folder in proc sys dev; do
        mount -o move "/$folder" "/mnt/$folder"
    done
    exec switch_root /mnt /sbin/init
fi

# The power button, if a driver reports it: 24-byte records, of which the key's begins after 16.
for event in /dev/input/event*; do
    [ -e "$event" ] && (head -c 24 "$event" > /dev/null && echo "guest: power button" > /dev/console && poweroff -f) &
done

cd /root
stty -echo < /dev/console
echo "guest: ready, Linux $release" > /dev/console
while true; do
    setsid -c sh < /dev/console > /dev/console 2>&1
done
