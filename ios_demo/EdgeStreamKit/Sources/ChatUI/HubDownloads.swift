#if canImport(Darwin)
    import ChatCore
    import Foundation

    /// The hub over URLSession. Downloads go on while the app is in the background. One that ends while the app is not
    /// running is kept in a folder of caches, where the next download of the same file finds it.
    public final class HubDownloads: NSObject, ModelSource, URLSessionDownloadDelegate, @unchecked Sendable {
        private struct Waiting {
            let continuation: CheckedContinuation<URL, any Error>
            let onProgress: @Sendable (Double) -> Void
        }

        private let folder: URL
        private let lock = NSLock()
        private var waiting: [URL: Waiting] = [:]
        private var onIdle: (@Sendable () -> Void)?
        private var session: URLSession!

        /// `identifier`: of the background session; one per app.
        public init(identifier: String) throws {
            folder = try FileManager.default.url(
                for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true
            ).appendingPathComponent(identifier)
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            super.init()
            let configuration = URLSessionConfiguration.background(withIdentifier: identifier)
            configuration.sessionSendsLaunchEvents = true
            session = URLSession(configuration: configuration, delegate: self, delegateQueue: nil)
        }

        /// Called by the app's delegate when the system has woken the app for this session.
        public func whenIdle(_ call: @escaping @Sendable () -> Void) {
            lock.withLock { onIdle = call }
        }

        public func files(of repository: HubRepository) async throws -> [HubRepository.File] {
            let (data, response) = try await URLSession.shared.data(from: repository.listing)
            try Self.check(response)
            return try repository.files(in: data)
        }

        public func download(
            _ file: HubRepository.File, onProgress: @escaping @Sendable (Double) -> Void
        ) async throws -> URL {
            let arrived = place(of: file.address)
            if FileManager.default.fileExists(atPath: arrived.path) {
                return arrived
            }
            let running = await session.allTasks.first { $0.originalRequest?.url == file.address }
            return try await withTaskCancellationHandler {
                try await withCheckedThrowingContinuation { continuation in
                    let isFirst = lock.withLock {
                        guard waiting[file.address] == nil else { return false }
                        waiting[file.address] = Waiting(continuation: continuation, onProgress: onProgress)
                        return true
                    }
                    guard isFirst else {
                        return continuation.resume(throwing: CocoaError(.fileWriteFileExists))
                    }
                    (running ?? session.downloadTask(with: file.address)).resume()
                }
            } onCancel: {
                session.getAllTasks { tasks in
                    tasks.first { $0.originalRequest?.url == file.address }?.cancel()
                }
            }
        }

        private func place(of address: URL) -> URL {
            let name = address.path.map { $0.isLetter || $0.isNumber || "-._".contains($0) ? $0 : "-" }
            return folder.appendingPathComponent(String(name))
        }

        private func end(_ task: URLSessionTask, _ result: Result<URL, any Error>) {
            guard let address = task.originalRequest?.url else { return }
            lock.withLock { waiting.removeValue(forKey: address) }?.continuation.resume(with: result)
        }

        private static func check(_ response: URLResponse?) throws {
            if let http = response as? HTTPURLResponse, http.statusCode != 200 {
                throw URLError(http.statusCode == 404 ? .fileDoesNotExist : .badServerResponse)
            }
        }

        public func urlSession(
            _ session: URLSession, downloadTask: URLSessionDownloadTask, didFinishDownloadingTo location: URL
        ) {
            guard let address = downloadTask.originalRequest?.url else { return }
            let arrived = place(of: address)
            // the file is gone when this returns
            let result = Result {
                try Self.check(downloadTask.response)
                try? FileManager.default.removeItem(at: arrived)
                try FileManager.default.moveItem(at: location, to: arrived)
                return arrived
            }
            end(downloadTask, result)
        }

        public func urlSession(
            _ session: URLSession, downloadTask: URLSessionDownloadTask, didWriteData bytesWritten: Int64,
            totalBytesWritten: Int64, totalBytesExpectedToWrite: Int64
        ) {
            guard let address = downloadTask.originalRequest?.url, totalBytesExpectedToWrite > 0 else { return }
            let share = Double(totalBytesWritten) / Double(totalBytesExpectedToWrite)
            lock.withLock { waiting[address]?.onProgress }?(share)
        }

        public func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
            if let error {
                end(task, .failure(error))
            }
        }

        public func urlSessionDidFinishEvents(forBackgroundURLSession session: URLSession) {
            let call = lock.withLock {
                defer { onIdle = nil }
                return onIdle
            }
            if let call {
                DispatchQueue.main.async(execute: call)
            }
        }
    }
#endif
