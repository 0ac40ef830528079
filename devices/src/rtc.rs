// SPDX-License-Identifier: Apache-2.0
//! The MC146818 real-time clock of a PC: time of day.
//!
//! Registers as in the MC146818 data sheet; the century in 0x32 as ACPI's FADT may say. The guest's clock is
//! the host's, in UTC, plus what the guest has set it ahead; BCD and 24-hour mode. Alarms and periodic
//! interrupts do not exist: the guest has better timers.

use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use crate::bus::Action;
use crate::bus::Device;

/// Register that holds the century.
pub const CENTURY_REGISTER: u8 = 0x32;

/// Status A: 32.768 kHz time base, no update in progress.
const STATUS_A: u8 = 0x26;
/// Status B: 24-hour mode, BCD.
const STATUS_B: u8 = 0x02;
/// Register of status B.
const STATUS_B_REGISTER: u8 = 0x0b;
/// In status B: the time stands still while the guest sets it.
const SET: u8 = 0x80;
/// The registers that hold the time.
const TIME: [u8; 8] = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY_REGISTER];
/// Status D: the clock has power.
const STATUS_D: u8 = 0x80;

/// Units of an offset in a second: it counts 100 ns, as the guest-state file does.
pub const PER_SECOND: i64 = 10_000_000;

/// What is told when the guest has set its clock: how far it is ahead of the host's now, in units of 100 ns.
pub type Store = Box<dyn FnMut(i64) + Send>;

/// The clock: its index port, and the data port after it.
pub struct Rtc {
    index: u8,
    now: fn() -> SystemTime,
    cmos: [u8; 128],
    /// How far the guest's clock is ahead of the host's.
    ahead: i64,
    store: Option<Store>,
    /// The guest is setting the time; whether it has written any of it.
    setting: Option<bool>,
}

impl Default for Rtc {
    fn default() -> Self {
        Rtc { index: 0, now: SystemTime::now, cmos: [0; 128], ahead: 0, store: None, setting: None }
    }
}

/// A moment in UTC.
struct Civil {
    year: u64,
    month: u8,
    day: u8,
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// Splits seconds since 1970 by the Gregorian calendar. The year is taken to start in March, so that the leap
/// day is its last day, and counted in cycles of 400 years, which all have 146,097 days.
fn civil(seconds: u64) -> Civil {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Day 0 of the count is 0000-03-01, which is 719,468 days before 1970-01-01.
    let count = days + 719_468;
    let (cycle, day_of_cycle) = (count / 146_097, count % 146_097);
    let year_of_cycle =
        (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 } as u8;
    Civil {
        year: cycle * 400 + year_of_cycle + u64::from(month <= 2),
        month,
        day,
        // 1970-01-01 was a Thursday; Sunday is 1.
        weekday: ((days + 4) % 7 + 1) as u8,
        hour: (rest / 3600) as u8,
        minute: (rest / 60 % 60) as u8,
        second: (rest % 60) as u8,
    }
}

/// The other way round. `None`: no such moment, or one before 1970.
fn seconds(t: &Civil) -> Option<u64> {
    let leap = t.year.is_multiple_of(4) && (!t.year.is_multiple_of(100) || t.year.is_multiple_of(400));
    let days_in_month = match t.month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        _ => return None,
    };
    if !(1..=days_in_month).contains(&t.day) || t.hour > 23 || t.minute > 59 || t.second > 59 || t.year < 1970
    {
        return None;
    }
    // As in `civil`, the year starts in March.
    let year = t.year - u64::from(t.month <= 2);
    let month_from_march = u64::from(if t.month <= 2 { t.month + 9 } else { t.month - 3 });
    let day_of_year = (153 * month_from_march + 2) / 5 + u64::from(t.day) - 1;
    let days = 365 * year + year / 4 - year / 100 + year / 400 + day_of_year;
    let time = u64::from(t.hour) * 3600 + u64::from(t.minute) * 60 + u64::from(t.second);
    Some(days.checked_sub(719_468)? * 86_400 + time)
}

fn bcd(n: u8) -> u8 {
    ((n / 10 % 10) << 4) | (n % 10)
}

fn from_bcd(byte: u8) -> Option<u8> {
    let (tens, ones) = (byte >> 4, byte & 0xf);
    (tens < 10 && ones < 10).then_some(tens * 10 + ones)
}

impl Rtc {
    /// Sets how far the guest's clock is ahead of the host's, in units of 100 ns, and who is told when the
    /// guest changes that.
    pub fn keep(&mut self, ahead: i64, store: Option<Store>) {
        (self.ahead, self.store) = (ahead, store);
    }

    /// The host's time since 1970, in units of 100 ns.
    fn host(&self) -> i64 {
        let since = (self.now)().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_nanos() / 100).unwrap_or(i64::MAX)
    }

    /// What the guest wrote, as how far it is ahead of the host. The data sheet's first update comes half a
    /// second after the clock was started, which is what Linux counts on, so the second that was written is
    /// half over.
    fn written(&self) -> Option<i64> {
        let register = |index: u8| from_bcd(self.cmos[usize::from(index)]);
        let t = Civil {
            year: u64::from(register(CENTURY_REGISTER)?) * 100 + u64::from(register(0x09)?),
            month: register(0x08)?,
            day: register(0x07)?,
            weekday: 0,
            hour: register(0x04)?,
            minute: register(0x02)?,
            second: register(0x00)?,
        };
        let time = i64::try_from(seconds(&t)?).ok()?.checked_mul(PER_SECOND)?;
        time.checked_add(PER_SECOND / 2)?.checked_sub(self.host())
    }

    fn set_status_b(&mut self, value: u8) {
        match (value & SET != 0, self.setting) {
            (true, None) => {
                for index in TIME {
                    self.cmos[usize::from(index)] = self.register(index);
                }
                self.setting = Some(false);
            }
            (false, Some(changed)) => {
                self.setting = None;
                // A date that does not exist changes nothing.
                if let Some(ahead) = self.written().filter(|_| changed) {
                    self.ahead = ahead;
                    if let Some(store) = &mut self.store {
                        store(ahead);
                    }
                }
            }
            _ => {}
        }
    }

    fn register(&self, index: u8) -> u8 {
        if self.setting.is_some() && TIME.contains(&index) {
            return self.cmos[usize::from(index)];
        }
        let seconds = self.host().saturating_add(self.ahead).max(0) / PER_SECOND;
        let t = civil(seconds.unsigned_abs());
        match index {
            0x00 => bcd(t.second),
            0x02 => bcd(t.minute),
            0x04 => bcd(t.hour),
            0x06 => t.weekday,
            0x07 => bcd(t.day),
            0x08 => bcd(t.month),
            0x09 => bcd((t.year % 100) as u8),
            CENTURY_REGISTER => bcd((t.year / 100 % 100) as u8),
            0x0a => STATUS_A,
            STATUS_B_REGISTER => STATUS_B | if self.setting.is_some() { SET } else { 0 },
            0x0c => 0,
            0x0d => STATUS_D,
            other => self.cmos.get(usize::from(other)).copied().unwrap_or(0xff),
        }
    }
}

impl Device for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(if offset == 1 { self.register(self.index) } else { 0xff });
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        for &byte in data {
            match offset {
                // Bit 7 masks NMIs on a PC.
                0 => self.index = byte & 0x7f,
                _ if self.index == STATUS_B_REGISTER => self.set_status_b(byte),
                _ => {
                    if TIME.contains(&self.index) {
                        self.setting = self.setting.map(|_| true);
                    }
                    if let Some(cell) = self.cmos.get_mut(usize::from(self.index)) {
                        *cell = byte;
                    }
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn dates_agree_with_date_1() {
        // Expected values: `date -u -d @SECONDS +%F\ %T\ %u` of GNU coreutils.
        for (seconds, expected) in [
            (0, (1970, 1, 1, 0, 0, 0, 5)),
            (951_782_399, (2000, 2, 28, 23, 59, 59, 2)),
            (951_782_400, (2000, 2, 29, 0, 0, 0, 3)),
            (1_735_689_599, (2024, 12, 31, 23, 59, 59, 3)),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0, 2)),
        ] {
            let t = civil(seconds);
            assert_eq!((t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday), expected);
            assert_eq!(super::seconds(&t), Some(seconds));
        }
    }

    fn set(rtc: &mut Rtc, registers: &[(u8, u8)]) {
        for &(index, value) in registers {
            rtc.write(0, &[index]);
            rtc.write(1, &[value]);
        }
    }

    /// What Linux's mc146818_set_time writes: SET, the time, SET off.
    fn set_time(rtc: &mut Rtc, [century, year, month, day, hour, minute, second]: [u8; 7]) {
        let time = [(0x32, century), (9, year), (8, month), (7, day), (4, hour), (2, minute), (0, second)];
        set(rtc, &[(0x0b, 0x82)]);
        set(rtc, &time);
        set(rtc, &[(0x0b, 0x02)]);
    }

    const NOW: u64 = 1_735_689_599;

    fn rig() -> (Rtc, std::sync::Arc<std::sync::Mutex<Vec<i64>>>) {
        let told = std::sync::Arc::<std::sync::Mutex<Vec<i64>>>::default();
        let list = std::sync::Arc::clone(&told);
        let mut rtc = Rtc { now: || UNIX_EPOCH + Duration::from_secs(NOW), ..Rtc::default() };
        rtc.keep(0, Some(Box::new(move |ahead| list.lock().unwrap().push(ahead))));
        (rtc, told)
    }

    #[test]
    fn a_clock_that_was_set_stays_set() {
        let (mut rtc, told) = rig();
        // 2030-02-28 12:34:56, which `date -u +%s` gives as 1898512496.
        set_time(&mut rtc, [0x20, 0x30, 0x02, 0x28, 0x12, 0x34, 0x56]);
        assert_eq!(
            [9, 8, 7, 4, 2, 0].map(|index| read(&mut rtc, index)),
            [0x30, 0x02, 0x28, 0x12, 0x34, 0x56]
        );
        let ahead = (1_898_512_496 - NOW as i64) * PER_SECOND + PER_SECOND / 2;
        assert_eq!(*told.lock().unwrap(), [ahead]);
        let mut next = Rtc { now: || UNIX_EPOCH + Duration::from_secs(NOW + 60), ..Rtc::default() };
        next.keep(ahead, None);
        assert_eq!([4, 2, 0].map(|index| read(&mut next, index)), [0x12, 0x35, 0x56]);
    }

    #[test]
    fn a_moment_that_does_not_exist_changes_nothing() {
        let (mut rtc, told) = rig();
        for time in [
            [0x20, 0x25, 0x02, 0x29, 0x12, 0x00, 0x00],
            [0x20, 0x25, 0x13, 0x01, 0x12, 0x00, 0x00],
            [0x20, 0x25, 0x01, 0x01, 0x24, 0x00, 0x00],
            [0x20, 0x25, 0x01, 0x01, 0x1a, 0x00, 0x00],
            [0x19, 0x69, 0x12, 0x31, 0x23, 0x59, 0x59],
            [0xff; 7],
        ] {
            set_time(&mut rtc, time);
            assert_eq!([4, 2, 0].map(|index| read(&mut rtc, index)), [0x23, 0x59, 0x59], "{time:x?}");
        }
        // Neither does SET without a new time.
        set(&mut rtc, &[(0x0b, 0x82), (0x0b, 0x02)]);
        assert_eq!(*told.lock().unwrap(), []);
    }

    #[test]
    fn time_stands_still_while_it_is_set() {
        let (mut rtc, _) = rig();
        set(&mut rtc, &[(0x0b, 0x82), (4, 0x11)]);
        rtc.now = || UNIX_EPOCH + Duration::from_secs(NOW + 5);
        assert_eq!([4, 2, 0].map(|index| read(&mut rtc, index)), [0x11, 0x59, 0x59]);
        assert_eq!(read(&mut rtc, 0x0b) & SET, SET);
    }

    #[test]
    fn registers_are_bcd_in_24_hour_mode() {
        let mut rtc = Rtc { now: || UNIX_EPOCH + Duration::from_secs(1_735_689_599), ..Rtc::default() };
        let time: Vec<u8> =
            [0x32, 9, 8, 7, 4, 2, 0].into_iter().map(|register| read(&mut rtc, register)).collect();
        assert_eq!(time, [0x20, 0x24, 0x12, 0x31, 0x23, 0x59, 0x59]);
        assert_eq!(read(&mut rtc, 0x0b) & 0x06, 0x02);
        assert_eq!(read(&mut rtc, 0x0d), 0x80);
    }
}
