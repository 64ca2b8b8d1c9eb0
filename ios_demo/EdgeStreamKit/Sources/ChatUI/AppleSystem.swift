#if canImport(UIKit) && !os(watchOS)
    import ChatCore
    import UIKit
    import os

    /// iOS, as `ChatModel` knows it.
    @MainActor
    public final class AppleSystem: ChatSystem {
        // mach_task_self_ is a variable, which Swift 6 does not let anybody share
        private static let task = task_self_trap()

        @MainActor
        private final class BackgroundTime {
            var id = UIBackgroundTaskIdentifier.invalid
        }

        public init() {}

        /// 0 where there is no limit (the simulator): unknown.
        public var availableMemory: UInt64? {
            let bytes = os_proc_available_memory()
            return bytes > 0 ? UInt64(bytes) : nil
        }

        /// What counts towards the limit.
        public var footprint: UInt64? {
            var info = task_vm_info_data_t()
            let size = MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size
            var count = mach_msg_type_number_t(size)
            let status = withUnsafeMutablePointer(to: &info) {
                $0.withMemoryRebound(to: integer_t.self, capacity: size) {
                    task_info(Self.task, task_flavor_t(TASK_VM_INFO), $0, &count)
                }
            }
            return status == KERN_SUCCESS ? info.phys_footprint : nil
        }

        public var thermalLevel: ThermalLevel {
            switch ProcessInfo.processInfo.thermalState {
            case .nominal: .nominal
            case .fair: .fair
            case .serious: .serious
            case .critical: .critical
            @unknown default: .serious
            }
        }

        public func events() -> AsyncStream<SystemEvent> {
            let center = NotificationCenter.default
            return AsyncStream { continuation in
                let told: [(Notification.Name, @MainActor @Sendable (AppleSystem) -> SystemEvent)] = [
                    (UIApplication.didEnterBackgroundNotification, { _ in .background }),
                    (UIApplication.willEnterForegroundNotification, { _ in .foreground }),
                    (UIApplication.didReceiveMemoryWarningNotification, { _ in .memoryWarning }),
                    (ProcessInfo.thermalStateDidChangeNotification, { .thermal($0.thermalLevel) }),
                ]
                let listening = told.map { name, event in
                    Task { @MainActor [weak self] in
                        for await _ in center.notifications(named: name).map({ _ in () }) {
                            guard let self else { return }
                            continuation.yield(event(self))
                        }
                    }
                }
                continuation.onTermination = { _ in
                    for task in listening { task.cancel() }
                }
            }
        }

        public func beginBackgroundTime() -> Int {
            let time = BackgroundTime()
            time.id = UIApplication.shared.beginBackgroundTask(withName: "save the conversation") {
                UIApplication.shared.endBackgroundTask(time.id)
            }
            return time.id.rawValue
        }

        public func endBackgroundTime(_ id: Int) {
            UIApplication.shared.endBackgroundTask(UIBackgroundTaskIdentifier(rawValue: id))
        }

        public func sleep(for duration: Duration) async throws {
            try await Task.sleep(for: duration)
        }
    }
#endif
